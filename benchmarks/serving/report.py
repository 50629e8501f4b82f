"""One table, one JSON, one picture of what was measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COARSE = "fullrank, bfloat16"
Records = list[dict[str, Any]]
Interval = tuple[float, float, float]
HEADER = (
    "| model | server | req/s at 1 | 8 | 32 | 64 | of offline at 64 | CPU/image, of offline "
    "| p50 at 1, ms | p99 at 32, ms | open loop at 70 %: p50, p99, ms | late, % | failed |\n" + "|---" * 13 + "|"
)


def bootstrap(values: list[float], draws: int = 4000) -> Interval:
    """Median of paired rounds and the 95 % interval of that median, resampling rounds."""
    rounds: NDArray[np.float64] = np.array(values)
    medians = np.median(np.random.default_rng(0).choice(rounds, (draws, len(rounds))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(np.median(rounds)), float(low), float(high)


def rate(it: dict[str, Any]) -> float:
    return float(it["requests"] / it["seconds"])


def cost(it: dict[str, Any]) -> float:
    return float(it["cpu"] / max(1, it["requests"]))


def by_round(records: Records, figure: Callable[[dict[str, Any]], float], **key: Any) -> dict[int, float]:
    """{round: figure}, the mean where a round has several."""
    found: dict[int, list[float]] = {}
    for it in records:
        if key.items() <= it.items():
            found.setdefault(it["round"], []).append(figure(it))
    return {number: float(np.mean(values)) for number, values in found.items()}


def ratio(above: dict[int, float], below: dict[int, float]) -> Interval | None:
    shared = sorted(it for it in above.keys() & below.keys() if below[it] > 0)
    return bootstrap([above[it] / below[it] for it in shared]) if shared else None


def beside_loop(records: Records, figure: Callable[[dict[str, Any]], float], server: str) -> Interval | None:
    """A server's figure at 64 connections over that of the loop just before and after it."""
    full, loop = {"level": "64", "server": server}, {"level": "64", "server": "offline", "beside": server}
    return ratio(by_round(records, figure, **full), by_round(records, figure, **loop))


def best_loop(records: Records, level: str) -> dict[int, float]:
    """{round: rate} of the faster of the loops beside our service."""
    loops = [
        by_round(records, rate, level=level, server=name, beside="fullrank") for name in ("offline", "offline, eager")
    ]
    rounds = {number for loop in loops for number in loop}
    return {number: max(loop.get(number, 0.0) for loop in loops) for number in rounds}


def summarise(records: Records) -> list[dict[str, Any]]:
    """One entry for each model and server: medians over rounds; ratios as [median, low, high]."""
    entries = []
    for model in dict.fromkeys(it["model"] for it in records):
        mine = [it for it in records if it["model"] == model]
        for server in dict.fromkeys(it["server"] for it in mine):
            every = [it for it in mine if it["server"] == server]
            entry: dict[str, Any] = {"model": model, "server": server, "rounds": len({it["round"] for it in every})}
            entry["efficiency"], entry["cpu_ratio"] = (beside_loop(mine, figure, server) for figure in (rate, cost))
            entry["failed"] = sum(it.get("bad", 0) + it.get("broken", 0) for it in every)
            for level in dict.fromkeys(it["level"] for it in every):
                at = [it for it in every if it["level"] == level]
                entry[level] = {
                    "rps": float(np.median([rate(it) for it in at])),
                    "p50_ms": 1e3 * float(np.median([it["p50"] for it in at])),
                    "p99_ms": 1e3 * float(np.median([it["p99"] for it in at])),
                    "cpu_ms": 1e3 * float(np.median([cost(it) for it in at])),
                    "late_share": float(np.mean([it.get("late", 0) / max(1, it.get("sent", 1)) for it in at])),
                    "lag_ms": 1e3 * max(it.get("lag", 0.0) for it in at),
                }
            entries.append(entry)
    return entries


def goals(records: Records) -> list[str]:
    """Each goal with what was measured."""
    lines = []

    def line(name: str, value: Interval | None, holds: Callable[[float], bool] | None, unit: str = "") -> None:
        if value is not None:
            median, low, high = value
            word = "no goal" if holds is None else "met" if holds(median) else "FAILED"
            lines.append(f"{word:7} {name}: {median:.3f} [{low:.3f}, {high:.3f}]{unit}")

    def get(figure: Callable[[dict[str, Any]], float], model: str, server: str, level: str) -> dict[int, float]:
        return by_round(records, figure, model=model, server=server, level=level)

    real = [it for it in records if it["model"] == "resnet18"]
    ours = get(rate, "resnet18", "fullrank", "64")
    line("throughput at 64, of the best loop (>= 0.95)", ratio(ours, best_loop(real, "64")), lambda x: x >= 0.95)
    for name, least in (("mosec", 1.25), ("mosec onnx", 0.95)):
        theirs = get(rate, "resnet18", name, "64")
        line(f"throughput at 64, of {name} (>= {least})", ratio(ours, theirs), least.__le__)
    line("CPU an image, of the onnx loop (<= 1.1)", beside_loop(real, cost, "fullrank"), lambda x: x <= 1.1)
    one, alone = (
        by_round(real, lambda it: 1e3 * it["p50"], level="1", **name)
        for name in ({"server": "fullrank"}, {"server": "offline", "beside": "fullrank"})
    )
    extra = [one[it] - alone[it] for it in one.keys() & alone.keys()]
    line("p50 at 1 beyond the onnx loop (<= 2.5)", bootstrap(extra) if extra else None, lambda x: x <= 2.5, " ms")
    coarse = get(rate, "resnet18", COARSE, "64")
    others = {name: get(rate, "resnet18", name, "64") for name in ("fullrank", "mosec", "mosec onnx")}
    alike = by_round(real, rate, level="64", server="offline, bfloat16", beside=COARSE)
    for name, theirs in ({"its loop in bfloat16": alike} | others).items():
        line(f"in bfloat16: throughput at 64, of {name}", ratio(coarse, theirs), None)
    line("in bfloat16: CPU an image, of the onnx loop", beside_loop(real, cost, COARSE), None)
    halves = ratio(*(get(lambda it: it["p50"], "resnet18", name, "1") for name in (COARSE, "fullrank")))
    line("in bfloat16: p50 at 1, of fullrank", halves, None)
    large = ratio(*(get(rate, "efficientnet", name, "64") for name in ("fullrank", "thread batcher")))
    line("EfficientNet-Lite0 at 64, of the eager thread batcher (>= 3)", large, lambda x: x >= 3)
    for name, most in (("thread batcher", 0.5), ("mosec", 1.0)):
        tail = ratio(*(get(lambda it: it["p99"], "null", server, "32") for server in ("fullrank", name)))
        line(f"null p99 at 32, of {name} (<= {most:g})", tail, most.__ge__)
    on, off = (get(rate, "resnet18", name, "unlike") for name in ("fullrank", "fullrank, monitor off"))
    line("throughput with the monitor, of without (>= 0.99)", ratio(on, off), lambda x: x >= 0.99)
    return lines


def table(entries: list[dict[str, Any]]) -> str:
    def at(entry: dict[str, Any], level: str, figure: str, digits: int = 1) -> str:
        return f"{entry[level][figure]:.{digits}f}" if level in entry else ""

    def interval(value: Interval | None) -> str:
        return "" if value is None else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"

    rows = [HEADER]
    for it in entries:
        if "64" not in it:
            continue  # only there for a comparison
        rates = [at(it, level, "rps", 0) for level in ("1", "8", "32", "64")]
        tails = [at(it, "1", "p50_ms", 2), at(it, "32", "p99_ms")]
        opened = f"{at(it, 'open', 'p50_ms')}, {at(it, 'open', 'p99_ms')}" if "open" in it else ""
        late = f"{100 * it['open']['late_share']:.1f}" if "open" in it else ""
        ratios = [interval(it["efficiency"]), interval(it["cpu_ratio"])]
        cells = [it["model"], it["server"], *rates, *ratios, *tails, opened, late, it["failed"]]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Throughput against the offline loop, and the null model's tail."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    real = [
        it
        for it in entries
        if it["model"] == "resnet18" and not it["server"].startswith("offline") and it["efficiency"]
    ]
    real.sort(key=lambda it: it["efficiency"][0])
    for y, it in enumerate(real):
        median, low, high = it["efficiency"]
        left.barh(y, median, color="C0" if it["server"] == "fullrank" else "0.7")
        left.errorbar(median, y, xerr=[[median - low], [high - median]], color="k", capsize=3)
    left.set_yticks(range(len(real)), [it["server"] for it in real])
    left.axvline(1, color="k", linewidth=0.8)
    left.set_xlabel("ResNet-18 at 64 px, 64 connections: throughput / offline loop, median and 95 %")
    null = [it for it in entries if it["model"] == "null" and "32" in it]
    null.sort(key=lambda it: -it["32"]["p99_ms"])
    colours = ["C0" if it["server"] == "fullrank" else "0.7" for it in null]
    right.barh([it["server"] for it in null], [it["32"]["p99_ms"] for it in null], color=colours)
    right.set_xscale("log")
    right.set_xlabel("null model, 32 connections: p99, ms")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(records: Records, folder: Path) -> None:
    """Print the table and the goals; write report.json and report.png beside the measurements."""
    records = [it for it in records if "server" in it]
    entries = summarise(records)
    verdicts = goals(records)
    print(table(entries), *verdicts, sep="\n", flush=True)
    (folder / "report.json").write_text(json.dumps({"entries": entries, "goals": verdicts}, indent=1) + "\n")
    draw(entries, folder / "report.png")
    print(f"written: {folder / 'report.json'}, {folder / 'report.png'}")
