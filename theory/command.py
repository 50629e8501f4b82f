"""`fullrank lab NAME`: run a theory experiment, print what should be seen beside what was seen."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from rich.console import Console

from theory.lab import NAMES, Diverged, Lab, ParameterError, Result, Settings, describe_domain, find
from theory.render import PictureError, document, picture, show, table


def main(argv: list[str]) -> int:
    """Run `NAME`, `all` or `--list`; 0 if every claim holds, 1 if one fails or a run diverges, 2 for bad parameters."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small: a second thread costs more than it gives
    try:
        return _main(argv)
    except ParameterError as error:
        print(f"fullrank lab: {error}", file=sys.stderr)
        return 2
    except SystemExit as leave:  # argparse: --help and malformed flags
        return leave.code if isinstance(leave.code, int) else 2
    finally:
        torch.set_num_threads(threads)


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "--list"):
        for name in NAMES:
            print(f"{name:26}{find(name).title}")
        print("\nfullrank lab NAME --help shows a lab's parameters.")
        print("Example: fullrank lab strong-augmentation --amplitude 1")
        return 0
    name, *flags = argv
    labs = [find(each) for each in NAMES] if name == "all" else [find(name)]
    options = vars(_parser(name, labs).parse_args(flags))
    as_json, out = options.pop("json"), options.pop("out")
    given = {key: value for key, value in options.items() if value is not None}
    parameters = [lab.parameters(**given) for lab in labs]  # every domain is checked before anything runs

    console = Console(stderr=as_json)
    results: list[tuple[str, Result]] = []
    documents: list[dict[str, Any]] = []
    failed = False
    for lab, settings in zip(labs, parameters, strict=True):
        start = time.perf_counter()
        try:
            with console.status(f"{lab.name} ..."):
                result = lab.run(settings)
        except Diverged as error:
            console.print(f"{lab.name} diverged: {error}", style="bold red", highlight=False, markup=False)
            documents.append({"lab": lab.name, "holds": False, "diverged": str(error)})
            failed = True
            continue
        seconds = time.perf_counter() - start
        results.append((lab.name, result))
        documents.append(document(lab, settings, result, seconds, series=False))
        failed |= not result.holds
        if len(labs) == 1 and not as_json:
            show(console, lab, result, seconds)
        elif not as_json:
            held = sum(claim.holds for claim in result.claims)
            console.print(f"{lab.name}: {held} of {len(result.claims)} claims hold ({seconds:.1f} s)", highlight=False)
        _write(lab, settings, result, seconds, out, console)
    if len(labs) > 1 and results and not as_json:
        console.print(table("every lab", results))
    if as_json:
        print(json.dumps(documents if len(labs) > 1 else documents[0], indent=2, ensure_ascii=False))
    return int(failed)


def _parser(name: str, labs: list[Lab]) -> argparse.ArgumentParser:
    """Flags from the parameter dataclass; `all` has only what every lab shares."""
    shared: type[Settings] = labs[0].parameters if len(labs) == 1 else Settings
    example = labs[0].example if len(labs) == 1 else "--seed 3"
    parser = argparse.ArgumentParser(
        prog=f"fullrank lab {name}",
        description=labs[0].title if len(labs) == 1 else "Every lab, then one table.",
        epilog=f"example: fullrank lab {name} {example}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the example stays on one line, to be copied
    )
    kinds = get_type_hints(shared)
    for entry in fields(shared):
        numeric = kinds[entry.name] is not str
        domain = f", {describe_domain(entry.metadata)}" if numeric else ""
        parser.add_argument(
            f"--{entry.name.replace('_', '-')}",
            type=kinds[entry.name],
            metavar="X" if numeric else "PATH",
            help=f"{entry.metadata['text']} (default {entry.default!r}{domain})".replace("%", "%%"),
        )
    parser.add_argument("--json", action="store_true", help="print the claims as JSON")
    where = "folder for NAME.png and NAME.json with the curves (default runs/lab)"
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/lab"), help=where)
    return parser


def _write(lab: Lab, settings: Settings, result: Result, seconds: float, out: Path, console: Console) -> None:
    out.mkdir(parents=True, exist_ok=True)
    found = document(lab, settings, result, seconds, series=True)
    (out / f"{lab.name}.json").write_text(json.dumps(found, ensure_ascii=False) + "\n")
    try:
        picture(lab, result, out / f"{lab.name}.png")
    except PictureError as error:
        console.print(f"no picture: {error}", highlight=False, markup=False)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
