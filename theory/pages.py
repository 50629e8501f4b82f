"""Write docs/theory: one page a lab, with its picture and its claims as measured at the default parameters.

python -m theory.pages [FOLDER] [NAME ...]
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import torch

from theory.lab import NAMES, Lab, Result, Settings, describe_domain, find
from theory.render import picture

INTRODUCTION = """# Theory: why encoders collapse, and what prevents it

Every page is an experiment that runs in seconds on a laptop: `fullrank lab NAME` prints what the theory predicts beside
what integration, sampling or autograd gives, and takes its parameters as flags, so that a prediction can be checked at
values nobody chose beforehand. The pages are written by `python -m theory.pages`, at the default parameters.
"""


def body(lab: Lab) -> tuple[str, str]:
    """The lab's docstring without its title, split before the part for those who serve embeddings."""
    text = lab.page.split("\n", 1)[1].strip()
    before, heading, after = text.partition("## What it means")
    return before.strip(), (heading + after).strip()


def claims(result: Result) -> str:
    rows = ["| what must be seen | formula | predicted | observed | |", "|---|---|---:|---:|---|"]
    for claim in result.claims:
        cells = [claim.statement, claim.formula, claim.expectation, f"{claim.observed:.6g}"]
        escaped = [cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells]
        rows.append(f"| {' | '.join(escaped)} | {'holds' if claim.holds else '**fails**'} |")
    return "\n".join(rows)


def parameters(lab: Lab) -> str:
    rows = ["| flag | default | domain | |", "|---|---:|---|---|"]
    for entry in fields(lab.parameters):
        numeric = not isinstance(entry.default, str)
        domain = describe_domain(entry.metadata) if numeric else ""
        name, default = entry.name.replace("_", "-"), entry.default if numeric else ""
        rows.append(f"| `--{name}` | {default} | {domain} | {entry.metadata['text']} |")
    return "\n".join(rows)


def page(lab: Lab, result: Result) -> str:
    before, after = body(lab)
    return f"""# {lab.title}

![{lab.title}]({lab.name}.png)

{before}

## Predicted and seen

{claims(result)}

`fullrank lab {lab.name}` gives this table; try `fullrank lab {lab.name} {lab.example}`.

{parameters(lab)}

{after}
"""


def write(folder: Path, names: list[str]) -> None:
    """Run the labs and write their pages and pictures, then the index of all labs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        lab = find(name)
        settings: Settings = lab.parameters()
        result = lab.run(settings)
        (folder / f"{name}.md").write_text(page(lab, result))
        picture(lab, result, folder / f"{name}.png")
        print(f"{name}: {sum(claim.holds for claim in result.claims)} of {len(result.claims)} claims hold", flush=True)
    written = [name for name in NAMES if (folder / f"{name}.md").exists()]
    index = "\n".join(f"- [{find(name).title}]({name}.md) (`fullrank lab {name}`)" for name in written)
    (folder / "README.md").write_text(f"{INTRODUCTION}\n{index}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/theory"), sys.argv[2:] or list(NAMES))
