"""Swapping encoders: what the gate refuses, what a swap keeps, who may ask for one."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest
import torch

from models import artifact, gate
from models.backbones.resnet import ResNet
from models.embedder import Embedder, normalize
from models.junit import junit
from service.encoders.registry import Service
from service.settings import Settings
from tests.support.app import Start, error_of, held, pending
from tests.support.images import DIMENSION, as_files, encoded, pictures

pytestmark = pytest.mark.anyio
IMAGES = [encoded(picture) for picture in pictures(8)]


async def test_a_healthy_candidate_is_swapped_in_with_a_fresh_monitor(start: Start) -> None:
    async with start() as (client, service):
        old = service.current
        done = (await client.post("/admin/encoders", json={"name": "beta"})).json()
        assert (done["served"]["model"], done["previous"]["model"]) == ("beta", "alpha")
        assert done["compared_with"] == done["served"]
        assert done["judgement"]["passed"]
        assert service.current.monitor is not old.monitor
        answer = (await client.post("/embed", files=as_files(IMAGES))).json()
        assert (answer["model"], answer["revision"]) == ("beta", service.current.revision)
        metrics = (await client.get("/metrics")).text
        assert 'model="beta"' in metrics
        assert 'model="alpha"' not in metrics


async def test_a_collapsed_candidate_is_refused_and_the_old_one_stays(start: Start) -> None:
    async with start() as (client, service):
        error = error_of(await client.post("/admin/encoders", json={"name": "collapsed"}), 409, "collapsed")
        assert "variance" in error["message"]
        assert service.current.name == "alpha"
        assert (await client.post("/embed", files=as_files(IMAGES))).json()["model"] == "alpha"


async def test_with_warn_the_incumbents_reference_stays_the_comparison_until_a_candidate_passes(start: Start) -> None:
    async with start() as (client, service):
        alpha = service.current.artifact
        done = (await client.post("/admin/encoders", json={"name": "collapsed", "gate": "warn"})).json()
        assert not done["judgement"]["passed"]
        assert (done["served"]["model"], done["compared_with"]["model"]) == ("collapsed", "alpha")
        for _ in range(2):
            monitor = service.current.monitor
            assert monitor is not None
            assert monitor.reference is not None
            assert alpha.reference is not None
            assert torch.equal(monitor.reference.eigenvalues, alpha.reference.eigenvalues)
            await client.post("/admin/encoders", json={"name": "collapsed", "gate": "warn"})
        pictures_seen = [encoded(picture) for picture in pictures(600, seed=7)]
        for i in range(0, 600, 100):
            assert (await client.post("/embed", files=as_files(pictures_seen[i : i + 100]))).status_code == 200
        assert await asyncio.to_thread(service.engine.settle, 120)
        assert service.current.monitor is not None
        assert await asyncio.to_thread(service.current.monitor.flush, 120)
        assert (await client.get("/spectrum")).json()["verdict"]["state"] == "complete_collapse"
        back = (await client.post("/admin/encoders", json={"name": "alpha"})).json()
        assert back["compared_with"]["model"] == "alpha"


async def test_with_off_anything_loadable_is_served(start: Start) -> None:
    async with start() as (client, service):
        done = (await client.post("/admin/encoders", json={"name": "collapsed", "gate": "off"})).json()
        assert done["judgement"] is None
        assert done["compared_with"]["model"] == "collapsed"
        assert service.current.name == "collapsed"


async def test_requests_during_swaps_are_answered_by_one_encoder_each(
    start: Start, settings: Callable[..., Settings]
) -> None:
    pixels = pictures(8)[:, None]
    wanted = {}
    for name in ("alpha", "beta"):
        loaded = artifact.load(settings().encoders_dir / name)
        wanted[loaded.card.revision] = normalize(Embedder(loaded).embed(pixels)).numpy()
    async with start(max_batch=4) as (client, _):
        swapping, seen = True, list[str]()

        async def ask() -> None:
            while swapping:
                response = await client.post("/embed", files=as_files(IMAGES))
                assert response.status_code == 200, response.text
                body = response.json()
                np.testing.assert_allclose(body["embeddings"], wanted[body["revision"]], atol=1e-5)
                seen.append(body["model"])

        async def answered_by(name: str) -> None:
            async with asyncio.timeout(120):
                while name not in seen:
                    await asyncio.sleep(0.001)

        clients = [asyncio.create_task(ask()) for _ in range(4)]
        await answered_by("alpha")
        for name in ("beta", "alpha"):
            assert (await client.post("/admin/encoders", json={"name": name})).status_code == 200
            seen.clear()
            await answered_by(name)
        swapping = False
        await asyncio.gather(*clients)


async def test_requests_admitted_for_the_old_encoder_are_answered_after_the_swap(start: Start) -> None:
    async with start() as (client, service):
        old = service.current
        with held(old) as hold:
            waiting = asyncio.create_task(client.post("/embed", files=as_files(IMAGES)))
            await pending(service, 8)
            swap = asyncio.create_task(client.post("/admin/encoders", json={"name": "beta", "gate": "off"}))
            await asyncio.sleep(0.05)
            hold.release.set()
            assert (await swap).status_code == 200
            assert (await waiting).status_code == 200


@pytest.mark.parametrize("name", ["../alpha", "/etc", "..", ".", "", "a/b", "alpha\n", "alpha\x00", "a\\b", "é"])
async def test_names_are_names_not_paths(shared: tuple[httpx.AsyncClient, Service], name: str) -> None:
    error_of(await shared[0].post("/admin/encoders", json={"name": name}), 422, "invalid_field")


async def test_a_link_out_of_the_folder_is_no_encoder(start: Start, encoders: Path, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "escape").symlink_to(encoders / "alpha")
    async with start(encoders_dir=tmp_path / "inside") as (client, _):
        error_of(await client.post("/admin/encoders", json={"name": "escape"}), 404, "no_such_encoder")


async def test_unknown_names_and_bad_bodies(start: Start) -> None:
    async with start() as (client, _):
        error = error_of(await client.post("/admin/encoders", json={"name": "gamma"}), 404, "no_such_encoder")
        assert "alpha, beta" in error["message"]
        for body in ({}, {"name": 3}, {"name": "beta", "gate": "maybe"}, {"name": "beta", "path": "/x"}, []):
            error_of(await client.post("/admin/encoders", json=body), 422, "invalid_field")
        broken = await client.post("/admin/encoders", content=b"{", headers={"content-type": "application/json"})
        assert error_of(broken, 400, "malformed_json")["field"] == "body"
        untyped = await client.post("/admin/encoders", content=b"{}", headers={"content-type": "text/plain"})
        assert "application/json" in error_of(untyped, 422, "invalid_field")["message"]


async def test_without_a_key_it_answers_loopback_only(start: Start) -> None:
    async with start(address="10.1.2.3") as (client, _):
        error_of(await client.post("/admin/encoders", json={"name": "beta"}), 403, "forbidden")
        assert (await client.post("/embed", files=as_files(IMAGES))).status_code == 200
    async with start() as (client, _):
        rebound = await client.post("/admin/encoders", json={"name": "beta"}, headers={"host": "evil.example"})
        error_of(rebound, 403, "forbidden")
        garbled = await client.post("/admin/encoders", json={"name": "beta"}, headers={"origin": "http://[::1"})
        error_of(garbled, 403, "forbidden")


async def test_with_a_key_it_answers_its_bearer_from_anywhere(start: Start) -> None:
    async with start(address="10.1.2.3", api_key="correct horse") as (client, _):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "correct horse"}):
            for path in ("/embed", "/admin/encoders"):
                response = await client.post(path, json={"name": "beta"}, headers=headers)
                error_of(response, 401, "unauthorized")
                assert response.headers["www-authenticate"] == "Bearer"
        headers = {"authorization": "Bearer correct horse"}
        assert (await client.post("/admin/encoders", json={"name": "beta"}, headers=headers)).status_code == 200
        assert (await client.post("/embed", files=as_files(IMAGES), headers=headers)).status_code == 200
        assert "correct horse" not in (await client.get("/info")).text


def test_figures_agree_with_numpy() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 16)) * np.geomspace(1, 0.1, 16) + 1.0
    rows[:, 3] = 0.7
    figures = gate.Figures.of(torch.from_numpy(rows))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    p = np.linalg.eigvalsh(np.cov(unit.T))
    p = p[p > 1e-15] / p.sum()
    assert figures.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert figures.total_variance == pytest.approx(unit.var(axis=0, ddof=1).sum(), rel=1e-9)
    dead = gate.Figures.of(torch.from_numpy(np.concatenate([rows, np.zeros((200, 48))], axis=1)))
    assert dead.dead_fraction == 0.75


def test_without_an_incumbent_floors_decide(encoders: Path) -> None:
    for name, passed in (("alpha", True), ("collapsed", False)):
        loaded = artifact.load(encoders / name)
        judgement = gate.judge(Embedder(loaded), loaded)
        assert judgement.incumbent is None
        assert judgement.passed is passed, judgement.reason
    assert "at least 0.01" in judgement.reason
    bare = artifact.load(encoders / "broken")
    assert "no canary" in gate.judge(Embedder(bare), bare).reason


def changed(folder: Path, change: Callable[[ResNet], None]) -> artifact.Artifact:
    """The encoder of a folder after a change that its reference and canary know nothing of."""
    loaded = artifact.load(folder)
    with torch.no_grad():
        change(loaded.encoder)
    return loaded


def project(rank: int) -> Callable[[torch.nn.Module, object, torch.Tensor], torch.Tensor]:
    """A hook that keeps `rank` directions of what a module gives, none of them along an axis."""
    keep = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=torch.Generator().manual_seed(0)))[0][:, :rank]
    return lambda module, given, rows: rows @ keep @ keep.T


def test_a_subspace_without_a_dead_unit_is_refused_by_the_directions_that_died(encoders: Path) -> None:
    alpha = artifact.load(encoders / "alpha")
    flat = artifact.load(encoders / "alpha")
    flat.encoder.register_forward_hook(project(16))
    judgement = gate.judge(Embedder(flat), replace(alpha, canary=None), alpha)
    assert not judgement.passed
    assert {check.name for check in judgement.checks if not check.passed} == {"alive_fraction"}
    assert judgement.candidate is not None
    assert judgement.candidate.dead_fraction == 0
    assert judgement.candidate.alive_fraction == 16 / 32
    died = judgement.dead[-1]
    assert (died.first, died.last, died.share) == (17, 32, pytest.approx(0, abs=1e-6))
    assert "directions 17 to 32 hold" in judgement.reason


def test_damage_shows_on_its_own_canary_whatever_the_incumbent(encoders: Path) -> None:
    def damage(encoder: ResNet) -> None:
        encoder.get_parameter("layer2.0.conv1.weight").neg_()

    damaged = changed(encoders / "alpha", damage)
    for incumbent in (None, artifact.load(encoders / "beta")):
        judgement = gate.judge(Embedder(damaged), damaged, incumbent)
        assert not judgement.passed
        assert "least cosine of its canary images" in judgement.reason


def test_embeddings_that_are_not_finite_are_refused(encoders: Path) -> None:
    broken, alpha = artifact.load(encoders / "broken"), artifact.load(encoders / "alpha")
    judgement = gate.judge(Embedder(broken), broken, alpha)
    assert not judgement.passed
    assert "share of canary images with finite embeddings 0, at least 1" in judgement.reason


def test_floors_hold_against_a_poor_incumbent_and_an_encoder_passes_against_itself(encoders: Path) -> None:
    collapsed = artifact.load(encoders / "collapsed")
    assert gate.judge(Embedder(collapsed), collapsed, collapsed).passed
    assert collapsed.canary is not None
    poor = gate.Figures.of(collapsed.canary.embeddings)
    better = replace(poor, participation_ratio=4.0, total_variance=0.02)
    failed = {check.name: check.limit for check in gate.varied(poor, better) if not check.passed}
    assert failed["participation_ratio"] == gate.FLOOR_PARTICIPATION_RATIO
    assert failed["total_variance"] == 0.01


def test_a_report_for_ci_has_a_case_for_each_criterion(encoders: Path) -> None:
    collapsed, alpha = artifact.load(encoders / "collapsed"), artifact.load(encoders / "alpha")
    judgement = gate.judge(Embedder(collapsed), collapsed, alpha)
    suite = ElementTree.fromstring(junit("collapsed", judgement)).find("testsuite")
    assert suite is not None
    cases = {case.get("name"): case.find("failure") for case in suite}
    failed = {name for name, failure in cases.items() if failure is not None}
    assert cases.keys() == {check.name for check in judgement.checks}
    assert failed == {check.name for check in judgement.checks if not check.passed}
    assert (suite.get("tests"), suite.get("failures")) == (str(len(cases)), str(len(failed)))
    unreadable = ElementTree.fromstring(junit("x", gate.Judgement(False, "no <such> & file"))).find(
        "testsuite/testcase"
    )
    assert unreadable is not None
    assert unreadable.get("name") == "load"


async def test_a_collapsed_encoder_is_not_ready_unless_the_gate_lets_it(start: Start, encoders: Path) -> None:
    async with start(encoder=encoders / "collapsed") as (client, _):
        error = error_of(await client.get("/readyz"), 503, "failed")
        assert "collapsed is not fit to serve: total variance" in error["message"]
        assert "FULLRANK_GATE=warn" in error["message"]
    for lenient in ("warn", "off"):
        async with start(encoder=encoders / "collapsed", gate=lenient) as (client, _):
            assert (await client.get("/readyz")).status_code == 200
