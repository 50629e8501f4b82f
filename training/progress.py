"""Progress display of a run: a bar on a terminal, plain lines if the output goes to a file."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 30.0
"""Seconds between two plain lines."""


class Steps:
    """Counts the steps of an epoch, or the images of a measurement, and shows them."""

    def __init__(self, console: Console, bar: Progress, title: str, total: int | None, done: int, every: float) -> None:
        self.console = console
        self.bar = bar
        self.title = title
        self.total = total
        self.done = done
        self.every = every
        self.task = bar.add_task(escape(title), total=total, completed=done, extra="")
        self.began = self.shown = time.monotonic()
        self.first = done

    def advance(self, count: int = 1, extra: str = "") -> None:
        """Count `count` more as done, and show `extra` beside the count."""
        self.done += count
        self.bar.update(self.task, advance=count, extra=escape(extra))
        if not self.console.is_terminal and time.monotonic() - self.shown >= self.every:
            self.shown = time.monotonic()
            of = f"/{self.total}" if self.total else ""
            self.console.print(f"{self.title}  {self.done}{of}  {extra}".rstrip(), markup=False, soft_wrap=True)

    def rate(self) -> float:
        """Steps done a second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)


@contextmanager
def shown(console: Console, title: str, total: int | None, done: int = 0, every: float = EVERY) -> Iterator[Steps]:
    """Show steps on a bar that disappears when they are done, or as plain lines, one every `every` seconds."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    extra = TextColumn("{task.fields[extra]}")
    with Progress(*columns, extra, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Steps(console, bar, title, total, done, every)


class Stages:
    """Shows work in stages. Call `stages(stage, newly_done, total)`, as `models.references.Progress` says."""

    def __init__(self, console: Console, bar: Progress, known: Mapping[str, int]) -> None:
        self.console = console
        self.bar = bar
        self.known = known
        self.tasks: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int | None = None) -> None:
        if stage not in self.tasks:
            total = total or self.known.get(stage)
            self.tasks[stage] = int(self.bar.add_task(escape(stage), total=total, extra=""))
            if not self.console.is_terminal:
                self.console.print(f"{stage} ...", markup=False, soft_wrap=True)
        self.bar.update(self.tasks[stage], advance=done)  # type: ignore[arg-type]


@contextmanager
def stages(console: Console, **known: int) -> Iterator[Stages]:
    """Show stages with their counts on a terminal, or as plain lines, one at the start of each stage.

    known: how much there is to do, by stage.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Stages(console, bar, known)
