"""`fullrank fleet` against real replicas: exact where they agree, clear where they do not."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner, Result

from cli import app
from cli.common import console
from fullrank import Moments
from fullrank.fleet import FleetError, Replica, combine, read, survey, to_dict
from service.http.app import Server
from service.settings import Settings
from tests.support.images import as_files, encoded, pictures
from tests.support.process import running
from tools.stack import free_port

KEY = "a long secret"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no cell of a table is cut. The console took its width when it was made."""
    monkeypatch.setattr(console, "width", 160)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["fleet", *arguments], env={"FULLRANK_API_KEY": ""})


@pytest.fixture(scope="module")
def replicas(settings: Callable[..., Settings]) -> Iterator[list[tuple[str, Server, torch.Tensor]]]:
    """Two replicas of one encoder that have embedded different images, and their rows."""
    with (
        running(settings(api_key=KEY)) as (first, one),
        running(settings(api_key=KEY)) as (second, other),
    ):
        found = []
        for seed, (url, server) in enumerate([(first, one), (second, other)]):
            images = [encoded(picture) for picture in pictures(48, seed=50 + seed)]
            answer = httpx.post(
                f"{url}/embed", files=as_files(images), headers={"Authorization": f"Bearer {KEY}"}, timeout=60
            )
            assert answer.status_code == 200, answer.text
            assert server.service.current.monitor is not None
            assert server.service.engine.settle(120)
            assert server.service.current.monitor.flush(120)
            found.append((url, server, torch.tensor(answer.json()["embeddings"])))
        yield found


def test_an_address_that_is_none_is_named() -> None:
    with pytest.raises(FleetError, match=r"http://\[::1: expected an address such as"):
        read("http://[::1")


def test_the_fleet_is_the_rows_of_all_replicas_together(replicas: list[tuple[str, Server, torch.Tensor]]) -> None:
    urls = [url for url, _, _ in replicas]
    result = run(*urls, "--key", KEY, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = torch.cat([rows for _, _, rows in replicas])
    together = Moments(rows.shape[1]).add(rows)
    assert found["whole"]["rows"] == 96
    assert found["whole"]["participation_ratio"] == pytest.approx(together.participation_ratio(), rel=1e-4)
    assert found["whole"]["total_variance"] == pytest.approx(float(together.covariance().trace()), rel=1e-4)
    for url, _, part in replicas:
        alone = Moments(part.shape[1]).add(part)
        assert found["replicas"][url]["participation_ratio"] == pytest.approx(alone.participation_ratio(), rel=1e-4)
    assert (found["model"], found["window"]) == ("alpha", "3600")
    [group] = found["groups"]
    assert [(it["url"], it["verdict"], it["seen"]) for it in group["members"]] == [
        (url, "insufficient_data", 48) for url in urls
    ]
    assert (found["unread"], found["problems"]) == ({}, [])


def test_the_table_says_what_the_sum_means(replicas: list[tuple[str, Server, torch.Tensor]]) -> None:
    urls = [url.removeprefix("http://") for url, _, _ in replicas]
    result = run(*urls, "--key", KEY, "--window", "300")
    assert result.exit_code == 0, result.output
    assert all(url in result.stdout for url in urls)
    for words in ("fleet, exact", "sum of rates", "last 300 s", "Alert on each replica"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "the key was refused (401)"),
        (("--key", "wrong"), "the key was refused (401)"),
        (("--key", KEY, "--window", "7"), "answered 422: window 7 is not kept; choose one of 300, 3600"),
        (("--key", KEY, "--model", "stranger"), "answered 404"),
    ],
)
def test_a_refusal_names_the_replica_and_the_reason(
    replicas: list[tuple[str, Server, torch.Tensor]], options: tuple[str, ...], message: str
) -> None:
    result = run(replicas[0][0], *options)
    assert result.exit_code == 1
    assert f"{replicas[0][0]}: {message}" in result.stderr


def test_every_unreachable_replica_is_named(replicas: list[tuple[str, Server, torch.Tensor]]) -> None:
    dead = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    result = run(replicas[0][0], *dead, "--key", KEY)
    assert result.exit_code == 1
    assert all(f"{url}: unreachable" in result.stderr for url in dead)
    assert "insufficient_data" in result.stdout  # those that answer are listed all the same
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (("file:///etc/passwd",), "expected an address such as"),
        (("127.0.0.1:1", "127.0.0.1:1"), "named twice"),
        (("not an address",), "not an address: "),
    ],
)
def test_bad_addresses_are_named(urls: tuple[str, ...], message: str) -> None:
    result = run(*urls)
    assert result.exit_code == 1
    assert message in result.stderr


def replica(url: str = "a", model: str = "m", revision: str = "r", window: str = "300", d: int = 8) -> Replica:
    return Replica(url, model, revision, window, Moments(d).add(np.random.default_rng(len(url)).normal(size=(600, d))))


@pytest.mark.parametrize("change", [{"model": "n"}, {"revision": "s"}, {"window": "3600"}, {"d": 9}])
def test_replicas_that_do_not_belong_together_are_refused(change: dict[str, Any]) -> None:
    name = "dimension" if "d" in change else next(iter(change))
    with pytest.raises(FleetError, match=rf"differ in {name} .*: a \w+, b {next(iter(change.values()))}"):
        combine([replica("a"), replica("b", **change)])
    with pytest.raises(FleetError, match="at least one"):
        combine([])


def collapsed(url: str, verdict: str = "unknown") -> Replica:
    rows = 1 + 1e-4 * np.random.default_rng(7).normal(size=(600, 1)).repeat(8, 1)
    return Replica(url, "m", "r", "300", Moments(8).add(rows), verdict, "a subspace is gone")


def test_a_replica_that_collapses_alone_is_named() -> None:
    healthy = [replica(url) for url in ("a", "bb", "ccc")]
    assert survey(healthy).problems == []
    [group] = (found := survey([*healthy, collapsed("dead")])).groups
    [problem] = found.problems
    assert problem.startswith("dead stands out alone among 4 replicas of m@r: total variance ")
    assert [it.url for it in group.members if it.stands_out] == ["dead"]
    assert group.whole.rows == 2400
    [problem] = survey([*healthy, collapsed("dead", "dimensional_collapse")]).problems
    assert "dimensional_collapse: a subspace is gone" in problem
    [problem] = survey([collapsed(url, "complete_collapse") for url in "abc"]).problems
    assert "all 3 replicas of m@r" in problem
    # Of two that differ without a verdict, nobody knows which is right.
    assert survey([healthy[0], collapsed("dead")]).problems == []


def test_without_ranks_the_same_replica_stands_out_by_the_same_figures() -> None:
    replicas = [*(replica(url) for url in ("a", "bb", "ccc")), collapsed("dead"), replica("new", revision="s")]
    full, quick = survey(replicas), survey(replicas, ranked=False)
    assert quick.problems == full.problems != []
    for group, other in zip(full.groups, quick.groups, strict=True):
        for figures, less in [
            (group.whole, other.whole),
            *((it.figures, also.figures) for it, also in zip(group.members, other.members, strict=True)),
        ]:
            assert less.rows == figures.rows
            assert less.participation_ratio == pytest.approx(figures.participation_ratio, rel=1e-9)
            assert less.total_variance == pytest.approx(figures.total_variance, rel=1e-9)
            assert np.isnan(less.effective_rank)


def test_two_revisions_are_said_and_not_averaged() -> None:
    found = survey([replica("a"), replica("b"), replica("c", revision="s")], {"http://d": "http://d: unreachable: no"})
    assert [(it.revision, [m.url for m in it.members], it.whole.rows) for it in found.groups] == [
        ("r", ["a", "b"], 1200),
        ("s", ["c"], 600),
    ]
    assert found.problems == [
        "http://d gives no figures: unreachable: no",
        "the replicas of m serve 2 revisions, which are not averaged: r on a, b; s on c",
    ]
    told = to_dict(found)
    assert "whole" not in told
    assert json.loads(json.dumps(told))["groups"][1]["members"][0]["figures"]["rows"] == 600


def test_the_sum_of_rates_hides_a_collapsed_replica_and_the_spread_between_them() -> None:
    rng = np.random.default_rng(0)
    healthy = [Replica(f"h{i}", "m", "r", "300", Moments(8).add(rng.normal(size=(4000, 8)))) for i in range(3)]
    point = Replica("dead", "m", "r", "300", Moments(8).add(1 + 1e-4 * rng.normal(size=(4000, 1)).repeat(8, 1)))
    fleet = combine([*healthy, point])
    assert fleet.summed_participation_ratio == pytest.approx(8, rel=0.02)
    assert fleet.replicas["dead"].participation_ratio == pytest.approx(1, rel=0.02)
    axis = np.eye(8)
    narrow = [
        Replica(f"n{i}", "m", "r", "300", Moments(8).add(rng.normal(size=(4000, 1)) * axis[i] + 3 * axis[i]))
        for i in range(8)
    ]
    fleet = combine(narrow)
    assert fleet.summed_participation_ratio == pytest.approx(1, rel=0.02)
    assert fleet.whole.participation_ratio > 6


def test_too_few_rows_read_as_unknown_and_say_how_many_are_needed() -> None:
    few = Replica("few", "m", "r", "300", Moments(64).add(np.random.default_rng(0).normal(size=(100, 64))))
    empty = Replica("empty", "m", "r", "300", Moments(64))
    fleet = combine([few, empty])
    assert np.isnan(fleet.whole.effective_rank)
    assert fleet.whole.minimum_rows > 100
    assert fleet.replicas["empty"].rows == 0


class Odd(BaseHTTPRequestHandler):
    """A server that answers /a with a redirect, /b with words, /c with bare moments, /d with a tensor missing."""

    keys: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        Odd.keys.append(self.headers["Authorization"])
        moments = Moments(3).add(np.random.default_rng(0).normal(size=(50, 3))).tensors()
        bodies = {"/b/moments": b"hello, this is no tensor", "/c/moments": save(moments)}
        bodies["/d/moments"] = save({name: tensor for name, tensor in moments.items() if name != "cubic"})
        redirected = self.path.startswith("/a")
        self.send_response(302 if redirected else 200)
        if redirected:
            self.send_header("Location", "/c/moments")
        body = b"" if redirected else bodies[self.path.partition("?")[0]]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def odd() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Odd) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_other_servers_are_read_if_they_speak_moments_and_named_if_they_do_not(odd: str) -> None:
    bare = read(f"{odd}/c", key="k")
    assert (bare.model, bare.moments.count) == ("unknown", 50)
    assert Odd.keys[-1] == "Bearer k"
    asked = len(Odd.keys)
    with pytest.raises(FleetError, match="answered 302"):
        read(f"{odd}/a", key="k")
    assert len(Odd.keys) == asked + 1  # the redirect was not followed, so the key went nowhere else
    with pytest.raises(FleetError, match="not moments"):
        read(f"{odd}/b")
    with pytest.raises(FleetError, match="cubic"):
        read(f"{odd}/d")


def test_help_has_an_example() -> None:
    assert "fullrank fleet http://" in CliRunner().invoke(app, ["fleet", "--help"], terminal_width=160).stdout
