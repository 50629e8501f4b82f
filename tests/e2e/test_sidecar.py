"""docs/howto/sidecar.md, run: each of its programs, and the shipped rules on what they export."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.rules import about_embeddings

D, FAMILIES = 16, ("fullrank_verdict", "fullrank_threshold", "fullrank_effective_rank", "fullrank_rows_total")


def program(deploy: Path, name: str, **changes: str) -> str:
    """A program of the page, with other ports or folders."""
    text = (deploy.parent / "docs" / "howto" / "sidecar.md").read_text()
    found = re.search(rf"```python {name}\n(.*?)```", text, re.DOTALL)
    assert found, name
    source = found[1]
    for old, new in changes.items():
        assert source.count(old.replace("_", "")) == 1, old
        source = source.replace(old.replace("_", ""), new)
    return source


def rows(count: int, seed: int, rank: int = D) -> np.ndarray:
    """Gaussian rows of falling variance about a common mean; those of lower rank lie in a subspace."""
    z = np.random.default_rng(seed).normal(size=(count, D)) / np.sqrt(np.arange(1, D + 1))
    z[:, rank:] = 0
    return (z + np.eye(D)[0] * 2).astype(np.float32)


@pytest.fixture(scope="module")
def exported(
    tool: Callable[[str], str], deploy: Path, small_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A Prometheus with the shipped rules that has scraped all three: healthy, then collapsed, then training rows."""
    from tools.stack import free_port, prometheus, service, wait

    tool("prometheus")
    folder = tmp_path_factory.mktemp("sidecar")
    (folder / "references").mkdir()
    names: dict[str, Any] = {"healthy": rows(4000, 0)}
    exec(program(deploy, "reference", references=str(folder / "references")), names)
    server, run = free_port(), free_port()
    with service(folder, encoder=small_artifact, references_dir=folder / "references", threads=1, gate="off") as url:
        exec(program(deploy, "observe", **{"http://127.0.0.1:8000": url}), names)
        for i in range(5):
            names["report"](rows(200, 10 + i))
        names["embed"] = lambda items: rows(len(items), int(items[0][1:]), rank=4)
        exec(program(deploy, "server", _9100=str(server)), names)
        for i in range(5):
            names["answer"]([f"i{j}" for j in range(200 * i, 200 * (i + 1))])
        watched = names["monitor"]
        training: dict[str, Any] = {"dimension": D, "batches": range(5)}
        training["step"] = lambda views: torch.from_numpy(rows(200, 20 + views)).requires_grad_()
        exec(program(deploy, "training", _9100=str(run)), training)
        assert watched.flush(120)
        assert training["monitor"].flush(120)
        targets = [url.removeprefix("http://"), f"127.0.0.1:{server}", f"127.0.0.1:{run}"]
        with prometheus(folder, targets) as it:
            judged = "count(fullrank_effective_rank{window='5m'} > 0)"
            assert wait(lambda: it.value(judged) == 3, 120), it.query("fullrank_effective_rank")
            yield it
        watched.close()
        training["monitor"].close()


def states(server: Any) -> dict[tuple[str, str], str]:
    found = server.query("fullrank_verdict == 1")
    return {(labels["model"], labels["revision"]): labels["state"] for labels, _ in found}


def test_each_is_judged_by_its_own_reference(exported: Any) -> None:
    from tools.stack import wait

    expected = {
        ("theirs", "observed"): "healthy",
        ("theirs", "2026-01"): "dimensional_collapse",
        ("my-run", "seed-0"): "insufficient_data",
    }
    assert wait(lambda: expected.items() <= states(exported).items(), 120), states(exported)


def test_all_export_the_names_and_labels_that_the_rules_read(exported: Any) -> None:
    from tools.stack import wait

    def kinds(family: str) -> dict[str, frozenset[str]]:
        return {labels["model"]: frozenset(labels) for labels, _ in exported.query(family)}

    for family in FAMILIES:
        assert wait(lambda family=family: {"theirs", "my-run"} <= kinds(family).keys(), 120), family
        assert len(set(kinds(family).values())) == 1, family


def test_the_shipped_rules_fire_on_the_collapsed_one_and_are_silent_without_a_reference(
    exported: Any, deploy: Path
) -> None:
    from tools.stack import wait

    def paged() -> set[tuple[str, str]]:
        pages = (alert["labels"] for alert in exported.alerts() if alert["labels"]["severity"] == "page")
        return {(it["model"], it["revision"]) for it in pages if it["alertname"] in about_embeddings(deploy)}

    assert wait(lambda: bool(paged()), 120)
    assert paged() == {("theirs", "2026-01")}
