"""Writes the table of settings in docs/reference/settings.md from service.settings: `python -m tools.settings_docs`."""

from pathlib import Path

from service.settings import PRETRAINED, Settings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "settings.md"
MARK = "<!-- settings -->\n"
COUNTED = {"threads": "the CPUs less one, at least 1", "decode_threads": "the same, at most 4"}


def table() -> str:
    """The table, with one line for each setting: its variable, its default and its description."""
    lines = ["Each is a flag of `fullrank serve` and a variable.", "", "| variable | default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        lines.append(f"| `FULLRANK_{name.upper()}` | {_default(name, field.default)} | {field.description} |")
    return "\n".join(lines) + "\n"


def _default(name: str, value: object) -> str:
    if name in COUNTED:
        return COUNTED[name]
    if isinstance(value, Path):
        return f"`{Path('models/pretrained') / value.relative_to(PRETRAINED)}`"
    if isinstance(value, tuple):
        value = ",".join(f"{it:g}" if isinstance(it, float) else str(it) for it in value)
    if value is None or value in ("", {}):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def written(page: str) -> str:
    """The page with the present table at its end."""
    before, mark, _ = page.partition(MARK)
    return before + mark + "\n" + table()


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
