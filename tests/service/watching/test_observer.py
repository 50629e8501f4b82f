"""What the observer makes of answered images before a monitor gets them."""

import numpy as np
import pytest
import torch
from PIL import Image

from fullrank import Reference, SpectrumMonitor
from fullrank.descriptors import thumbnails
from service.engine.queue import Rows
from service.metrics import Metrics
from service.watching.observer import BURST, Observer
from service.watching.sampling import Sample
from tests.support.app import Start
from tests.support.images import pictures

pytestmark = pytest.mark.anyio


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("0", "0", "cpu")


def test_thumbnails_are_area_means() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 32, 32), np.uint8)
    expected = np.array([[Image.fromarray(c).reduce(4) for c in image] for image in pixels]) / 255
    np.testing.assert_allclose(thumbnails(pixels), expected.reshape(3, -1), atol=0.51 / 255)
    flat = np.full((1, 1, 29, 29), 51, np.uint8)  # a side that 8 does not divide
    np.testing.assert_allclose(thumbnails(flat), 0.2, rtol=1e-6)


async def test_keys_are_of_pixels_and_secret(start: Start) -> None:
    pixels = pictures(2)[:, None]
    async with start() as (_, service):
        observer = service.current.observer
        keys = observer.keys(np.concatenate([pixels, pixels[:1]]))
        assert keys[0] == keys[2] != keys[1]
        other = Observer(service.metrics)
        assert set(other.keys(pixels)).isdisjoint(keys)


def test_keys_are_multilinear_hashes(metrics: Metrics) -> None:
    observer = Observer(metrics)
    pixels = np.random.default_rng(1).integers(0, 256, (5, 1, 9, 9), np.uint8)  # 81 bytes, padded to 88
    got = observer.keys(pixels)
    ((count, secret),) = observer._secrets.items()
    assert count == 22
    for image, key in zip(pixels, got, strict=True):
        words = [int.from_bytes(image.tobytes().ljust(88, b"\0")[i : i + 4], "little") for i in range(0, 88, 4)]
        pairs = zip(words[::2], words[1::2], secret[:11].tolist(), secret[11:].tolist(), strict=True)
        assert int(key) == sum((a + first) * (b + second) for a, b, first, second in pairs) % 2**64


def test_of_more_images_than_the_rate_so_many_are_observed_at_random(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []

    class Monitor:
        windows, reference = (300.0,), None

        def observe(self, rows: Rows, keys: object, inputs: np.ndarray) -> None:
            seen.extend(zip(rows[:, 0], inputs[:, 0], strict=True))

        def count_unsampled(self, rows: int) -> None:
            pass

    now = 0.0
    monkeypatch.setattr("service.watching.observer.Sample", lambda *options: Sample(*options, lambda: now))
    observer, busy, quiet = Observer(metrics, rate=40.0), Monitor(), Monitor()
    for step in range(200):  # 256 images a second; times without rounding
        now = step / 8
        images = np.arange(step * 32, step * 32 + 32)
        pixels = np.broadcast_to((images % 251)[:, None, None, None], (32, 1, 8, 8)).astype(np.uint8)
        pixels[:, 0, 7, 7] = images // 251  # no two alike
        observer.observe(busy, pixels, images[:, None].astype(np.float32))  # type: ignore[arg-type]
    assert len(seen) == len(set(seen)) == BURST + 5 * 199
    assert all(abs(pixel * 255 - image % 251) < 0.01 for image, pixel in seen)  # each row with its own image
    in_batch = np.bincount([int(image) % 32 for image, _ in seen if image >= 2048], minlength=32)  # after the burst
    assert in_batch.min() > 5  # 136 batches choose 5 of 32: 21 of each place, give or take 4
    assert metrics.registry.get_sample_value("fullrank_unsampled_images_total") == 200 * 32 - len(seen)
    del seen[:]
    others = np.arange(128, dtype=np.uint8)[:, None, None, None].repeat(8, 2).repeat(8, 3)
    observer.observe(quiet, others, np.zeros((128, 1), np.float32))  # type: ignore[arg-type]
    assert len(seen) == 128  # a monitor's sample is its own


def test_copies_of_one_picture_take_no_place_in_the_sample(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """150 exact copies a second beside 2 honest images on a collapsed encoder: the honest ones tell."""
    now = 0.0
    monkeypatch.setattr("service.watching.observer.Sample", lambda *options: Sample(*options, lambda: now))
    random = np.random.default_rng(3)
    healthy = torch.from_numpy(random.normal(size=(2, 600, 8)).astype(np.float32))
    observer = Observer(metrics, rate=50.0)
    with SpectrumMonitor(8, Reference.build(*healthy, calibrate=False), clock=lambda: now) as monitor:
        for second in range(299):
            now = float(second)
            pixels = np.zeros((152, 3, 40, 40), np.uint8)
            pixels[:2] = random.integers(0, 256, (2, 3, 40, 40))
            observer.observe(monitor, random.permutation(pixels), np.ones((152, 8), np.float32))
        snapshot = monitor.snapshot(wait=120)
        assert snapshot.verdict.state == "complete_collapse"
        assert snapshot.windows[300.0].rows == 2 * 299 + 1
        assert monitor.counters.rows["duplicate"] == 150 * 299 - 1
        assert snapshot.waiting == 0
    assert metrics.registry.get_sample_value("fullrank_unsampled_images_total") == 0


def test_a_client_that_floods_gets_a_quarter_of_the_sample_and_one_alone_all_of_it() -> None:
    now = 0.0
    sample = Sample(40.0, 256, 300.0, lambda: now)
    chosen: dict[int, int] = {1: 0, 2: 0}
    fresh = iter(range(10**6))
    for step in range(8000):
        now = step / 8
        several = step >= 4000  # from here on a second client sends one image in 33
        clients = [1] * 32 + [2] * several
        which, _ = sample.choose([next(fresh) for _ in clients], clients)
        for index in which:
            chosen[clients[index]] += 1
        if step == 3999:
            assert chosen == {1: 256 + 5 * 3999, 2: 0}
            chosen = {1: 0, 2: 0}
    assert chosen[2] > 3950  # the honest client's 8 a second, less than its cap of 10, but for the first seconds
    assert 0.95 < chosen[1] / (10 * 500) < 1.05
    now += 301
    which, _ = sample.choose([next(fresh) for _ in range(256)], [3] * 256)
    assert len(which) == 256  # the others are forgotten


def test_a_monitor_that_refuses_rows_does_not_end_the_observer(metrics: Metrics) -> None:
    observer, seen = Observer(metrics), []

    class Monitor:
        windows, reference = (300.0,), None

        def observe(self, rows: Rows, keys: object, inputs: object) -> None:
            if rows[0, 0] < 0:
                raise ValueError("negative")
            seen.append(rows[0, 0])

    for value in (-1, 5):
        observer.observe(Monitor(), np.zeros((1, 1, 8, 8), np.uint8), np.full((1, 2), value, np.float32))  # type: ignore[arg-type]
    assert seen == [5]
    assert metrics.registry.get_sample_value("fullrank_unobserved_images_total") == 1
