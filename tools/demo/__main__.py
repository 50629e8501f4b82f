"""Plays a collapse in under three minutes: a healthy encoder serves, a collapsed one is swapped in, an alert fires.

    python -m tools.demo

Starts the service and a real Prometheus with the shipped rules, unchanged, on loopback; sends Fashion-MNIST test
images; swaps to the collapsed encoder with gate=warn, so that the healthy one's reference stays the comparison; prints
what Prometheus has scraped, and ends when a page is firing in Prometheus' own API. Exit code 1 if none does.
Only the windows are shortened: the service watches 20 and 60 seconds, and Prometheus relabels them to 5m and 1h.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tools import demo
from tools.demo.traffic import Traffic, encoded
from tools.stack import START, Prometheus, StackError, call, prometheus, prometheus_binary, service
from training.data import SAMPLE, read_fashion_mnist

WINDOWS = {"20s": "5m", "1m": "1h"}
RATE = 48.0  # images a second: the sample's 1,000 test images in 21 s, so none comes twice in the shortest window
HEALTHY_SECONDS = 16.0
SCRAPE_SECONDS = 3  # a busy machine answers a scrape within them
BAR = 20

console = Console(highlight=False, soft_wrap=True)


class Demo:
    """Prints what Prometheus has scraped, line by line."""

    def __init__(self, server: Prometheus, started: float) -> None:
        self.server = server
        self.started = started

    def pages(self, state: str) -> list[dict[str, Any]]:
        """The alerts of severity "page" in a state, "pending" or "firing"."""
        return [a for a in self.server.alerts() if a["labels"].get("severity") == "page" and a["state"] == state]

    def fired(self, revision: str) -> list[dict[str, Any]]:
        """The pages that fire for a revision of an encoder. Those of the service as a whole name none."""
        return [alert for alert in self.pages("firing") if alert["labels"].get("revision") == revision]

    def verdict(self) -> str:
        return next((labels["state"] for labels, _ in self.server.query("fullrank_verdict == 1")), "not scraped yet")

    def line(self, encoder: str) -> None:
        """One line: time, encoder, effective rank against its reference, verdict, alerts."""
        rank = self.server.value('fullrank_effective_rank{window="5m"}')
        healthy = self.server.value("fullrank_reference_effective_rank")
        share = min(rank / healthy, 1.0) if rank == rank and healthy > 0 else 0.0
        colour = "green" if share > 0.7 else "red"
        text = Text(f"{time.monotonic() - self.started:4.0f} s  {encoder:<18} effective rank ")
        text.append(f"{rank:6.1f}" if rank == rank else "     ?", style="bold")
        text.append(f" of {healthy:5.1f}  " if healthy == healthy else " of     ?  ")
        text.append("█" * round(share * BAR), style=colour).append("░" * (BAR - round(share * BAR)), style="dim")
        text.append(f"  {self.verdict()}")
        for state, style in (("pending", "yellow"), ("firing", "bold red")):
            names = [alert["labels"]["alertname"].removeprefix("Embedding") for alert in self.pages(state)]
            text.append(f"  {', '.join(names)} {state}" if names else "", style=style)
        console.print(text)


def run(encoders: Path, healthy: str, collapsed: str, limit: float, folder: Path) -> int:
    """Run the demonstration. Returns 0 if a page fires on the collapsed encoder and none fires before it."""
    prometheus_binary()  # before anything is started
    pictures = encoded(read_fashion_mnist(SAMPLE, "test").images)
    started = time.monotonic()
    with (
        console.status("starting the service and Prometheus"),
        service(folder, encoder=encoders / healthy, encoders_dir=encoders, windows="20,60", block_rows=64) as url,
        prometheus(folder, [url.removeprefix("http://")], windows=WINDOWS, period=SCRAPE_SECONDS) as server,
        Traffic(url, pictures, RATE) as traffic,
    ):
        console.print(f"service {url}/ (its live page)   Prometheus {server.url}/alerts")
        shown = Demo(server, started)

        ready = time.monotonic()
        while time.monotonic() - ready < HEALTHY_SECONDS or shown.verdict() != "healthy":
            shown.line(healthy)
            if shown.pages("firing") or time.monotonic() - ready > 3 * HEALTHY_SECONDS:
                console.print(f"[red]the healthy encoder is judged {shown.verdict()}[/red]; is the machine overloaded?")
                return 1
            time.sleep(3)
        shown.line(healthy)

        swap = json.loads(call(f"{url}/admin/encoders", {"name": collapsed, "gate": "warn"}, timeout=START))
        swapped = time.monotonic()
        console.print(
            f"[bold]swapped to {swap['served']['model']}[/bold]; the gate warns: {swap['judgement']['reason']}"
        )
        revision = swap["served"]["revision"]
        while not (fired := shown.fired(revision)):
            shown.line(collapsed)
            if time.monotonic() - started > limit:
                console.print("[red]no page fired[/red]")
                return 1
            # Print often while the rank falls, then less often: the rules wait for a minute.
            time.sleep(2 if time.monotonic() - swapped < 12 else 6)
        shown.line(collapsed)
        console.print(
            f"[bold red]firing after {time.monotonic() - swapped:.0f} s[/bold red], by {server.url}/api/v1/alerts:"
        )
        for alert in fired:
            console.print(f"  [bold]{alert['labels']['alertname']}[/bold]  {alert['annotations']['summary']}")
            console.print(f"    {alert['annotations']['description']}")
            console.print(f"    {alert['annotations']['runbook_url']}")
        console.print(f"{traffic.answered} images embedded, {traffic.failed} not answered")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--encoders", type=Path, help="folder of encoders [the pretrained ones and the collapsed one]")
    parser.add_argument("--healthy", default=demo.HEALTHY, help="name of the first")
    parser.add_argument("--collapsed", default=demo.COLLAPSED.name, help="name of the one swapped in")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which it gives up")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="fullrank-demo-") as folder:
            encoders = arguments.encoders or demo.encoders(Path(folder, "encoders"))
            return run(encoders.resolve(), arguments.healthy, arguments.collapsed, arguments.limit, Path(folder))
    except (StackError, OSError) as error:
        console.print(f"{error}; is the machine overloaded?", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
