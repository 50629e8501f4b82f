"""A lab's result for people and for programs: rich table, JSON document, PNG picture."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from theory.lab import Lab, Result, Settings

MARKS = {"holds": "[green]holds[/]", "fails": "[bold red]FAILS[/]", "outside": "[yellow]outside[/]"}
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


class PictureError(RuntimeError):
    """matplotlib is not installed; the message says how to get it."""


def document(lab: Lab, parameters: Settings, result: Result, seconds: float, *, series: bool) -> dict[str, Any]:
    """The result as JSON-able data; numbers that are not finite become None. `series` adds the curves."""
    found: dict[str, Any] = {
        "lab": lab.name,
        "title": lab.title,
        "parameters": parameters.model_dump(),
        "holds": result.holds,
        "seconds": round(seconds, 3),
        "claims": [{**asdict(claim), "holds": claim.holds, "verdict": claim.verdict} for claim in result.claims],
    }
    if series:
        found["panels"] = [asdict(panel) for panel in result.panels]
    return {key: _jsonable(value) for key, value in found.items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(title: str, rows: list[tuple[str, Result]]) -> Table:
    """Claims of one or several labs; the lab's name is shown when there are several."""
    grid = Table(title=title, title_justify="left", show_lines=False, pad_edge=False)
    several = len(rows) > 1
    if several:
        grid.add_column("lab", style="bold", overflow="fold")
    grid.add_column("what must be seen", overflow="fold", ratio=5)
    grid.add_column("formula", style="dim", overflow="fold", ratio=4)
    grid.add_column("predicted", justify="right", overflow="fold")
    grid.add_column("observed", justify="right", overflow="fold")
    grid.add_column("", justify="center")
    for name, result in rows:
        for index, claim in enumerate(result.claims):
            verdict = MARKS[claim.verdict]
            lead = [name if index == 0 else ""] if several else []
            statement = f"{claim.statement} ({claim.outside})" if claim.outside else claim.statement
            cells = [*lead, statement, claim.formula, claim.expectation, f"{claim.observed:.6g}"]
            grid.add_row(*[cell.replace("[", r"\[") for cell in cells], verdict)
        grid.add_section()
    return grid


def show(console: Console, lab: Lab, result: Result, seconds: float) -> None:
    console.print(table(f"{lab.name}: {lab.title} ({seconds:.1f} s)", [(lab.name, result)]))


def picture(lab: Lab, result: Result, path: Path) -> None:
    """Write the panels side by side as a PNG. Raises `PictureError` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PictureError("the picture needs matplotlib: pip install 'fullrank-server[lab]'") from error

    count = len(result.panels)
    figure = Figure(figsize=(4.2 * count, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for index, panel in enumerate(result.panels):
        axes = figure.add_subplot(1, count, index + 1)
        for number, line in enumerate(panel.lines):
            axes.plot(
                list(line.x),
                list(line.y),
                label=line.label or None,
                color=PALETTE[number % len(PALETTE)],
                linestyle="none" if line.marks else ("--" if line.dashed else "-"),
                marker="o" if line.marks else None,
                markersize=4,
                linewidth=1.4,
            )
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel(panel.x, fontsize=8)
        axes.set_ylabel(panel.y, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        if panel.log_x:
            axes.set_xscale("log")
        if panel.log_y:
            axes.set_yscale("log")
        if any(line.label for line in panel.lines):
            axes.legend(fontsize=6.5, frameon=False)
    figure.savefig(path, dpi=80, metadata={"Software": ""}, pil_kwargs={"optimize": True})
