"""What a start, SIGHUP and a swap take from a folder, what they refuse, and what they leave behind."""

import asyncio
import gc
import logging
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from models import artifact, gate
from models.embedder import Embedder
from models.preprocess import Preprocessing
from service.encoders.served import Candidate
from service.engine.queue import Pixels, Rows
from tests.support.app import Start, error_of
from tests.support.images import as_files, encoded, pictures
from tests.support.process import replica

pytestmark = pytest.mark.anyio
FILES = as_files([encoded(picture) for picture in pictures(4)])


@pytest.fixture
def folders(encoders: Path, tmp_path: Path) -> Path:
    """A copy of the encoders, to be changed."""
    shutil.copytree(encoders, tmp_path / "encoders")
    return tmp_path / "encoders"


def bare(folder: Path, change: Callable[[torch.nn.Module], object]) -> None:
    """Take an encoder's reference and canary away and change its weights."""
    loaded = artifact.load(folder)
    with torch.no_grad():
        change(loaded.encoder)
    artifact.save(replace(loaded, reference=None, canary=None), folder)


def zero(encoder: torch.nn.Module) -> None:
    for parameter in encoder.parameters():
        parameter.zero_()


async def test_without_any_canary_an_encoder_that_embeds_nothing_is_refused(start: Start, folders: Path) -> None:
    bare(folders / "alpha", zero)
    bare(folders / "beta", lambda encoder: None)
    card = folders / "beta" / "encoder.json"
    card.write_text(re.sub(r'("std": \[\s*)0\.25', r"\g<1>1e-38", card.read_text()))
    wanted = {"alpha": "all zero", "broken": "not finite", "beta": "not finite"}
    for name, words in wanted.items():
        async with start(encoder=folders / name) as (client, _):
            error = error_of(await client.get("/readyz"), 503, "failed")
            assert words in error["message"], name
        async with start(encoder=folders / name, gate="warn") as (client, _):
            assert (await client.get("/readyz")).status_code == 200


async def test_a_swap_to_an_encoder_that_embeds_nothing_is_refused(start: Start, folders: Path) -> None:
    bare(folders / "beta", zero)
    async with start(encoder=folders / "alpha", encoders_dir=folders) as (client, service):
        error = error_of(await client.post("/admin/encoders", json={"name": "beta"}), 422, "bad_artifact")
        assert "all zero" in error["message"]
        assert service.current.name == "alpha"


def test_synthetic_images_differ_and_are_the_same_each_time() -> None:
    how = Preprocessing(size=28, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    images = gate.synthetic(how)
    assert images.shape[1:] == (3, 28, 28)
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    np.testing.assert_array_equal(images, gate.synthetic(how))


async def test_sighup_takes_a_new_reference_and_says_what_it_compares(
    start: Start, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fullrank.service")
    async with start(encoder=folders / "alpha") as (client, service):
        old = service.current
        await service.reload()
        assert service.current is old
        assert "unchanged" in caplog.text
        assert "weights, graph, architecture, preprocessing, reference" in caplog.text
        # The same weights, measured on other images, as `fullrank reference` leaves them.
        loaded = artifact.load(folders / "alpha")
        rows = gate.normalize(Embedder(loaded).embed(pictures(512, 77)[:, None]))
        assert loaded.reference is not None
        other = type(loaded.reference).build(rows[::2], rows[1::2], canary=loaded.reference.canary)
        artifact.save(replace(loaded, reference=other), folders / "alpha")
        await service.reload()
        assert "has new reference in" in caplog.text
        assert service.current is not old
        assert service.current.revision == old.revision
        assert service.current.monitor is not None
        assert service.current.monitor.reference is not None
        assert torch.equal(service.current.monitor.reference.eigenvalues, other.eigenvalues)
        assert (await client.post("/embed", files=FILES)).status_code == 200


async def test_sighup_takes_new_preprocessing_as_a_new_revision(
    start: Start, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fullrank.service")
    async with start(encoder=folders / "alpha") as (_, service):
        old = service.current
        loaded = artifact.load(folders / "alpha")
        card = loaded.card.model_copy(
            update={"preprocessing": loaded.card.preprocessing.model_copy(update={"resize": "crop"})}
        )
        artifact.save(replace(loaded, card=card), folders / "alpha")
        await service.reload()
        assert "has new preprocessing" in caplog.text
        assert service.current.artifact.card.preprocessing.resize == "crop"
        assert service.current.revision != old.revision


async def test_sighup_does_not_undo_a_swap_and_says_so(
    start: Start, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with start(encoder=folders / "alpha", encoders_dir=folders) as (client, service):
        assert (await client.post("/admin/encoders", json={"name": "beta"})).status_code == 200
        await service.reload()
        assert service.current.name == "beta"
        assert re.search(r"beta@\w+ came by a swap, .*it stays, though .*alpha is configured", caplog.text)


async def test_a_request_during_a_swap_waits_for_an_image_not_for_the_judgement(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, sizes = Candidate.embed, list[int]()

    def slowly(candidate: Candidate, pixels: Pixels) -> Rows:
        if candidate.name == "beta":
            sizes.append(len(pixels))
            time.sleep(0.04 * len(pixels))
        return honest(candidate, pixels)

    monkeypatch.setattr(Candidate, "embed", slowly)
    async with start(canary_period=600) as (client, _):
        swap = asyncio.create_task(client.post("/admin/encoders", json={"name": "beta"}))
        async with asyncio.timeout(120):
            while len(sizes) < 5:
                await asyncio.sleep(0.001)
        before = len(sizes)
        assert (await client.post("/embed", files=FILES)).json()["model"] == "alpha"
        assert len(sizes) <= before + 3  # of the 130 that the swap embeds
        assert not swap.done()
        assert (await swap).status_code == 200
    assert max(sizes[:100]) == 1


async def test_an_encoder_that_left_is_freed_without_the_garbage_collector(start: Start) -> None:
    async with start() as (client, service):
        for _ in range(2):  # what is made once
            for name in ("beta", "alpha"):
                assert (await client.post("/admin/encoders", json={"name": name})).status_code == 200
        left: list[weakref.ref[Any]] = []
        gc.collect()
        gc.disable()
        try:
            for name in ("beta", "alpha", "beta", "alpha"):
                served = service.current
                left += [weakref.ref(it) for it in (served, served.embedder, served.monitor, served.artifact.encoder)]
                requests = [asyncio.create_task(client.post("/embed", files=FILES)) for _ in range(4)]
                del served
                assert (await client.post("/admin/encoders", json={"name": name})).status_code == 200
                assert {response.status_code for response in await asyncio.gather(*requests)} == {200}
                del requests
            assert await asyncio.to_thread(service.engine.settle, 120)
            async with asyncio.timeout(120):
                while any(it() is not None for it in left):
                    await asyncio.sleep(0.02)
        finally:
            gc.enable()


@pytest.mark.soak
def test_memory_is_flat_over_fifty_swaps_under_load(encoders: Path) -> None:
    with replica(encoder=encoders / "alpha", encoders_dir=encoders) as it:
        stop, codes = threading.Event(), set[int]()

        def ask() -> None:
            with httpx.Client(timeout=120) as client:
                while not stop.is_set():
                    codes.add(client.post(it.url + "/embed", files=FILES).status_code)

        def swaps(count: int) -> float:
            for i in range(count):
                name = ("beta", "alpha")[i % 2]
                response = httpx.post(it.url + "/admin/encoders", json={"name": name}, timeout=120)
                assert response.status_code == 200, response.text
            return it.metric("process_resident_memory_bytes") / 2**20

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            before = swaps(20)  # what the allocator keeps, it keeps by then
            after = swaps(50)
        finally:
            stop.set()
            for thread in threads:
                thread.join(120)
        print(f"{before:.0f} MiB after 20 swaps, {after:.0f} after 70")
        assert codes == {200}
        assert after < before + 40
