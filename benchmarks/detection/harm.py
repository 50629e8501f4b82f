"""What a model's fault costs a user: the accuracy of the nearest neighbours that a search returns."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.detection.cases import Bench, Case
from training.data import ImageSet
from training.evaluate import NEIGHBOURS, knn_accuracy

BANK, QUERIES = 10_000, 5_000
BOUNDS = (1.0, 5.0)


class Harm:
    """An index made by the healthy encoder, as one is that was filled before the fault, and queries not in it."""

    def __init__(self, bench: Bench, bank: ImageSet, queries: ImageSet) -> None:
        self.bank, self.labels = bench.embed(bank.images), bank.labels
        self.queries, self.truth = queries.images, queries.labels
        self.healthy = knn_accuracy(self.bank, self.labels, bench.embed(self.queries), self.truth, NEIGHBOURS)

    def points(self, case: Case) -> float:
        """Points of accuracy that queries embedded by the faulty model lose; NaN where the model is not changed."""
        if case.served is None:
            return float("nan")
        found = knn_accuracy(self.bank, self.labels, case.served(self.queries), self.truth, NEIGHBOURS)
        return 100 * (self.healthy - found)


def by_harm(lost: Mapping[str, float], found: Sequence[tuple[str, bool]], healthy: float) -> Iterator[str]:
    """A table of how many runs of model faults were found, by the points they cost; `found`: a name and whether, one a
    run."""
    yield (
        f"\n**Found within the case's rows, by what the fault costs**: canary off. {NEIGHBOURS} "
        f"nearest of {BANK:,} training images embedded by the healthy encoder name {healthy:.1%} of {QUERIES:,} test "
        "images correctly\n"
    )
    yield "| points lost | faults | runs | found | not found in every run |\n|---|---|---|---|---|"
    edges = (float("-inf"), *BOUNDS, float("inf"))
    names = (f"under {BOUNDS[0]:g}", f"{BOUNDS[0]:g} to {BOUNDS[1]:g}", f"over {BOUNDS[1]:g}")
    for label, low, high in zip(names, edges[:-1], edges[1:], strict=True):
        runs = [(name, hit) for name, hit in found if low <= lost[name] < high]
        hits = sum(hit for _, hit in runs)
        missed = dict.fromkeys(name for name, hit in runs if not hit)
        share = f"{hits} ({hits / len(runs):.0%})" if runs else "–"
        listed = ", ".join(f"{name} ({lost[name]:.1f})" for name in missed)
        yield f"| {label} | {len({name for name, _ in runs})} | {len(runs)} | {share} | {listed or '–'} |"
