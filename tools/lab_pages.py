"""Write docs/theory: one page a lab, with its picture and its claims as measured at the default parameters.

python -m tools.lab_pages [FOLDER] [NAME ...]

A log at FOLDER/eigenspace-alignment.jsonl, the lines of a run's log.jsonl with `epoch` and `predictor_alignment`, is
shown on that lab's page as with --run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from theory import NAMES
from theory.lab import Lab, Result, Settings, describe_domain, find
from theory.render import picture

MARKS = {"holds": "holds", "fails": "**fails**", "outside": "outside its domain"}
INTRODUCTION = """# Theory: why encoders collapse, and what prevents it

Every page is an experiment that runs in seconds on a laptop: `fullrank lab NAME` prints what the theory predicts beside
what integration, sampling or autograd gives, and takes its parameters as flags, so that a prediction can be checked at
values nobody chose beforehand. The pages are written by `python -m tools.lab_pages`, at the default parameters.
"""


def body(lab: Lab) -> tuple[str, str]:
    """The lab's docstring without its title, split before the part for those who serve embeddings."""
    text = lab.page.split("\n", 1)[1].strip()
    before, heading, after = text.partition("## What it means")
    return before.strip(), (heading + after).strip()


def claims(result: Result) -> str:
    rows = ["| what must be seen | formula | predicted | observed | |", "|---|---|---:|---:|---|"]
    for claim in result.claims:
        statement = f"{claim.statement} ({claim.outside})" if claim.outside else claim.statement
        cells = [statement, claim.formula, claim.expectation, f"{claim.observed:.6g}"]
        escaped = [cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells]
        rows.append(f"| {' | '.join(escaped)} | {MARKS[claim.verdict]} |")
    return "\n".join(rows)


def parameters(lab: Lab) -> str:
    rows = ["| flag | default | domain | |", "|---|---:|---|---|"]
    for name, entry in lab.parameters.model_fields.items():
        numeric = entry.annotation is not str
        domain = describe_domain(entry) if numeric else ""
        default = entry.default if numeric else ""
        rows.append(f"| `--{name.replace('_', '-')}` | {default} | {domain} | {entry.description} |")
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
        log = folder / f"{name}.jsonl"
        settings: Settings = lab.parameters(run=str(log)) if log.exists() else lab.parameters()
        result = lab.run(settings)
        (folder / f"{name}.md").write_text(page(lab, result))
        picture(lab, result, folder / f"{name}.png")
        print(f"{name}: {result.counts}", flush=True)
    written = [name for name in NAMES if (folder / f"{name}.md").exists()]
    index = "\n".join(f"- [{find(name).title}]({name}.md) (`fullrank lab {name}`)" for name in written)
    (folder / "README.md").write_text(f"{INTRODUCTION}\n{index}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs/theory"), sys.argv[2:] or list(NAMES))
