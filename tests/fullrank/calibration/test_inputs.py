"""Descriptors of images, and the reference of inputs, against plain formulas in float64."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch.nn import functional as F

from fullrank import Moments, Reference, SpectrumMonitor
from fullrank.calibration.inputs import InputReference, describe_as
from fullrank.descriptors import describe, textures, thumbnails, width
from fullrank.verdict import thresholds

SIZE = 16


def fields(n, seed, channels=1):
    """(n, channels, 16, 16) uint8 smooth random fields."""
    noise = torch.rand(n, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(noise, size=SIZE, mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8).numpy()


def coarse(images):
    """Half of the resolution: each pixel the mean of its square of four."""
    means = images.reshape(len(images), -1, SIZE // 2, 2, SIZE // 2, 2).mean((3, 5)).round()
    return means.repeat(2, 2).repeat(2, 3).astype(np.uint8)


def texture_of(image):
    """The texture of one image (c, s, s), value by value."""
    c, side = image.shape[:2]
    levels = image.astype(np.float64).sum(0) / 255 / c
    at = [int((i + 0.5) * side / 8) for i in range(8)]
    found = []
    for lines in (levels[at], levels[:, at].T):
        for order in (1, 2):
            rough = np.abs(np.diff(lines, order, axis=1)).mean(0)
            n = len(rough)
            for eighth in range(8):
                start = eighth * n // 8
                part = rough[start : max(start + 1, (eighth + 1) * n // 8)]
                found.append(0.1 * math.log(part.mean() + 1 / 255))
    along = image[:, at].astype(np.float64).mean((1, 2)) / 255
    return [*found, *(along[i] - along[i + 1] for i in range(c - 1))]


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 8), (1, 28), (3, 33), (3, 64)])
def test_textures_are_what_their_formula_says(channels, side):
    images = np.random.default_rng(side).integers(0, 256, (3, channels, side, side), np.uint8)
    images[1] = 0
    images[2] = 255 * (np.indices((side, side)).sum(0) % 2)  # the largest differences that there are
    seen = textures(images)
    np.testing.assert_allclose(seen, [texture_of(image) for image in images], rtol=1e-4, atol=1e-6)
    described = describe(images)
    assert described.shape == (3, width(channels)) == (3, 64 * channels + 31 + channels)
    np.testing.assert_array_equal(described, np.concatenate((thumbnails(images), seen), 1))


@pytest.fixture(scope="module")
def known():
    return InputReference.build(torch.from_numpy(describe(fields(3000, 1, 3))))


def test_the_shift_of_textures_is_that_of_their_mean_in_the_reference_s_deviations(known):
    images = fields(500, 2, 3)
    moved = torch.from_numpy(describe(images)).double()
    moved[:, 192:] += 0.2 * torch.from_numpy(textures(fields(3000, 1, 3))).double().std(0)
    moments = Moments(width(3)).add(moved)
    read = known.read(moments)
    part = known.texture
    x = (moved[:, 192:] - part.mean) @ part.basis
    expected, start = 0.0, 0
    for end, energy in zip(part.bands, part.band_energy, strict=True):
        each = energy / (end - start)
        expected += float(((x[:, start:end].mean(0).square() - x[:, start:end].var(0) / len(x)) / each).sum())
        start = end
    assert read.texture_shift == pytest.approx(math.sqrt(expected / 34), rel=1e-6)
    assert read.texture_shift > 0.08
    usual = known.read(Moments(width(3)).add(known.bounded(torch.from_numpy(describe(fields(3000, 3, 3))))))
    assert usual.texture_shift < 0.04
    # Thumbnails alone say the same of themselves, and nothing of textures.
    few = known.read(Moments(192).add(torch.from_numpy(thumbnails(images))))
    assert (few.distance, few.variance_ratio) == pytest.approx((read.distance, read.variance_ratio))
    assert math.isnan(few.texture_shift)
    assert math.isnan(known.read(Moments(34).add(moved[:, 192:])).distance)


def test_a_share_of_the_images_moves_textures_by_twice_that_share_at_most(known):
    """Noise is 30 deviations away from smooth fields."""
    images = fields(4000, 8, 3)
    images[:200] = np.random.default_rng(0).integers(0, 256, (200, 3, SIZE, SIZE), np.uint8)
    raw = torch.from_numpy(describe(images)).double()
    along = ((raw - known.bounded(raw))[:, 192:] @ known.texture.basis).abs()
    assert float(along[200:].amax(1).median()) < 1
    part = known.texture
    sizes = torch.tensor(part.bands).diff(prepend=torch.zeros(1, dtype=torch.int64))
    deviations = (part.band_energy / sizes).sqrt().repeat_interleave(sizes)
    expected = ((raw[:, 192:] - part.mean) @ part.basis / deviations).clamp(-2, 2)
    seen = (known.bounded(raw)[:, 192:] - part.mean) @ part.basis / deviations
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(known.bounded(raw)[:, :192], raw[:, :192])
    shift = known.read(Moments(width(3)).add(known.bounded(raw))).texture_shift
    unbounded = known.read(Moments(width(3)).add(raw)).texture_shift
    assert 0.05 < shift < 0.1 + 0.02 < unbounded
    # The centre is where the bounded textures of the reference have mean 0.
    own = known.bounded(torch.from_numpy(describe(fields(3000, 1, 3))).double())
    centre = ((own[:, 192:].mean(0) - part.mean) @ part.basis / deviations).abs().max()
    assert float(centre) < 1e-6
    # Thumbnails alone, or other descriptors, stay what they are.
    torch.testing.assert_close(known.bounded(raw[:, :192]), raw[:, :192])


def test_a_reference_of_inputs_is_stored_with_its_textures_and_older_ones_have_none(known):
    assert (known.width, known.full_width) == (192, width(3))
    again = InputReference.from_tensors(load(save(known.tensors())))
    read = Moments(width(3)).add(torch.from_numpy(describe(fields(400, 5, 3))))
    assert asdict(again.read(read)) == pytest.approx(asdict(known.read(read)))
    older = InputReference.from_tensors({n: t for n, t in known.tensors().items() if ".texture." not in n})
    assert older.texture is None
    images = fields(40, 6, 3)
    for reference, expected in ((known, describe(images)), (older, thumbnails(images)), (None, thumbnails(images))):
        np.testing.assert_array_equal(describe_as(reference, images), expected)
    for name in ("inputs.texture.mean", "inputs.texture.basis", "inputs.texture.band_energy"):
        broken = known.tensors() | {name: torch.full((2,), math.nan)}
        with pytest.raises(ValueError, match=r"inputs\.texture"):
            InputReference.from_tensors(broken)
    # Images of one colour each have no texture, and descriptors of another kind are one part.
    plain = np.random.default_rng(7).integers(0, 256, (500, 1, 1, 1), np.uint8).repeat(9, 2).repeat(9, 3)
    flat = InputReference.build(torch.from_numpy(describe(plain)))
    assert flat.texture is None
    for describing in (describe, thumbnails):
        read = flat.read(Moments(describing(plain).shape[1]).add(torch.from_numpy(describing(plain))))
        assert read.distance < 0.2
        assert math.isnan(read.texture_shift)
    assert InputReference.build(torch.randn(500, 12)).texture is None


def embed(images):
    """(n, 24) rows of a small encoder with random filters, which see neighbouring pixels."""
    generator = torch.Generator().manual_seed(0)
    filters, out = torch.randn(24, 1, 3, 3, generator=generator), torch.randn(24 * 4, 24, generator=generator)
    maps = F.conv2d(torch.from_numpy(images).float() / 255, filters - filters.mean((2, 3), keepdim=True)).abs().sqrt()
    return F.adaptive_avg_pool2d(maps, 2).flatten(1) @ out


@pytest.fixture(scope="module")
def reference():
    images = fields(4096, 10)
    return Reference.build(embed(images), inputs=describe(images), labels=torch.arange(4096) % 8)


@pytest.mark.parametrize(
    ("served", "seen", "describing", "state"),
    [
        ("usual", "usual", describe, "healthy"),
        ("coarse", "coarse", describe, "traffic_shifted"),
        ("coarse", "usual", describe, "model_fault"),
        # Means of 8 x 8 cells are the same at half of the resolution: without textures the model is blamed.
        ("coarse", "coarse", thumbnails, "model_fault"),
    ],
)
def test_what_a_client_does_to_pixels_is_traffic_though_thumbnails_hardly_show_it(
    reference, served, seen, describing, state
):
    images = {"usual": fields(4096, 11)}
    images["coarse"] = coarse(images["usual"])
    np.testing.assert_allclose(thumbnails(images["coarse"]), thumbnails(images["usual"]), atol=0.51 / 255)
    with SpectrumMonitor(24, reference, (300.0,), clock=lambda: 0.0) as monitor:
        monitor.observe(embed(images[served]), inputs=describing(images[seen]))
        assert monitor.flush(120)
        snapshot = monitor.snapshot()
    assert snapshot.verdict.state == state, snapshot.verdict
    limit = thresholds(reference, 4096)["texture_shift"]
    assert (snapshot.inputs.texture_shift > limit) is (seen == "coarse" and describing is describe)


def test_a_state_s_inputs_are_kept_until_some_of_another_width_come(reference):
    """Thumbnails go on as such, though the reference knows textures, until descriptors of whole images come."""
    images = fields(1200, 12)
    with SpectrumMonitor(24, reference, (300.0,), clock=lambda: 0.0) as monitor:
        monitor.observe(embed(images[:300]), inputs=thumbnails(images[:300]))
        assert monitor.flush(120)
        before = monitor.snapshot()
        state = monitor.state()
    with SpectrumMonitor(24, reference, (300.0,), clock=lambda: 0.0) as monitor:
        monitor.restore(state)
        assert monitor.snapshot().inputs.distance == pytest.approx(before.inputs.distance)
        monitor.observe(embed(images[300:600]), inputs=describe(images[300:600]))
        with pytest.raises(ValueError, match="inputs: expected width 96, got 64"):
            monitor.observe(embed(images[:2]), inputs=thumbnails(images[:2]))
        monitor.observe(embed(images[600:]), inputs=describe(images[600:]))
        assert monitor.flush(120)
        snapshot = monitor.snapshot()
    window = snapshot.windows[300.0]
    assert (window.rows, snapshot.counters.rows["dropped"]) == (1200, 0)
    bounded = reference.inputs.bounded(torch.from_numpy(describe(images[300:])))
    expected = reference.inputs.read(Moments(96).add(bounded))
    assert asdict(snapshot.inputs) == pytest.approx(asdict(expected))
    assert math.isfinite(window.sample.input_correlation.estimate)


def test_textures_of_almost_all_images_of_one_colour_are_left_out():
    """One image that has a texture is in one half alone; NaN of one row is no texture."""
    plain = np.random.default_rng(7).integers(0, 256, (500, 1, 1, 1), np.uint8).repeat(9, 2).repeat(9, 3)
    plain[4, 0, :, ::2] = 255
    described = torch.from_numpy(describe(plain))
    expected = InputReference.build(torch.from_numpy(thumbnails(plain)))
    assert InputReference.build(described).texture is None
    assert torch.equal(InputReference.build(described).band_energy, expected.band_energy)
    described[4, 64:] = math.nan
    assert InputReference.build(described).texture is None


def test_rows_that_are_not_finite_move_no_centre():
    described = torch.from_numpy(describe(fields(400, 8)))
    holed = torch.cat((described, torch.full((2, width(1)), math.nan)))
    found, expected = (InputReference.build(it).texture for it in (holed, described))
    assert torch.equal(found.mean, expected.mean)


def test_a_reference_whose_parts_are_no_images_descriptors_is_refused(known):
    short = InputReference.build(torch.randn(300, 33, generator=torch.Generator().manual_seed(0)))
    broken = known.tensors() | {n.replace("inputs.", "inputs.texture.", 1): t for n, t in short.tensors().items()}
    with pytest.raises(ValueError, match=r"inputs\.mean and inputs\.texture\.mean have 192 and 33 values"):
        InputReference.from_tensors(broken)
    deep = known.tensors() | {"inputs." + 2000 * "texture." + "mean": torch.zeros(3)}
    assert InputReference.from_tensors(deep).texture.texture is None
