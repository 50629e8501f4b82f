"""Each operation against Pillow or a plain reference, the draws themselves, and the randomness per image."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import correlate1d
from torch import Generator

from training import augment
from training.augment import Augmentation, crop_boxes, gaussian_blur, luma, shift_hue

IDENTITY = Augmentation(crop=(1, 1), ratio=(1, 1), flip=0, jitter=0)


def images(n: int = 16, channels: int = 3, size: int = 28) -> torch.Tensor:
    generator = Generator().manual_seed(3)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def with_(**changes: object) -> Augmentation:
    return Augmentation(**{**IDENTITY.__dict__, **changes})  # type: ignore[arg-type]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def back(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32).transpose(2, 0, 1)


@pytest.mark.parametrize("cropped", [False, True])
def test_nothing_asked_changes_nothing(cropped: bool) -> None:
    x = images()
    torch.testing.assert_close(IDENTITY(x, seeded(), cropped), x.float() / 255, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cropped", [False, True])
def test_a_certain_flip_is_a_mirror(cropped: bool) -> None:
    x = images()
    torch.testing.assert_close(with_(flip=1.0)(x, seeded(), cropped), (x.float() / 255).flip(-1), atol=1e-5, rtol=0)


def test_a_crop_is_the_resampled_box_that_pillow_makes() -> None:
    """Smooth ramps, because grid_sample and Pillow weigh neighbours differently only where the image bends."""
    y, x = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    ramp = torch.stack([8 * x, 8 * y, 4 * (x + y)]).to(torch.uint8)
    changes = with_(crop=(0.2, 0.6), ratio=(3 / 4, 4 / 3))
    views = changes(ramp.expand(8, -1, -1, -1), seeded(5))
    boxes = changes.draw(8, seeded(5))[0]
    for view, top, left, height, width in zip(views, *(v.tolist() for v in boxes[:4]), strict=True):
        box = tuple(28 * edge for edge in (left, top, left + width, top + height))
        expected = back(pillow(ramp).resize((28, 28), Image.Resampling.BILINEAR, box=box))
        np.testing.assert_allclose(view[:, 2:-2, 2:-2].numpy() * 255, expected[:, 2:-2, 2:-2], atol=1.01)


def test_crop_boxes_cover_their_areas_and_ratios_and_fit() -> None:
    top, left, height, width = crop_boxes(20_000, (0.3, 0.6), (3 / 4, 4 / 3), seeded()).unbind(1)
    area, ratio = height * width, (width / height).log()
    assert float(area.min()) == pytest.approx(0.3, abs=0.01)
    assert float(area.max()) == pytest.approx(0.6, abs=0.01)
    assert float(area.mean()) == pytest.approx(0.45, abs=0.005)
    assert float(ratio.mean()) == pytest.approx(0, abs=0.01)
    assert float(ratio.std()) == pytest.approx(2 * np.log(4 / 3) / np.sqrt(12), rel=0.02)
    assert min(float(top.min()), float(left.min())) >= 0
    assert max(float((top + height).max()), float((left + width).max())) <= 1 + 1e-6


def test_a_ratio_that_never_fits_gives_the_largest_centred_box() -> None:
    """Full area of an image three times as wide as high: torchvision falls back to the widest allowed, centred."""
    box = crop_boxes(1, (1.0, 1.0), (3 / 4, 4 / 3), seeded(), shape=3.0)[0]
    torch.testing.assert_close(box, torch.tensor([0, (1 - 4 / 9) / 2, 1, 4 / 9]))


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.0, 1.7])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_operations_are_pillows(name: str, factor: float) -> None:
    enhance = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast}.get(name, ImageEnhance.Color)
    x = images(4)
    found = augment.OPERATIONS[name](x.float() / 255, torch.full((4, 1, 1, 1), factor))
    for view, image in zip(found, x, strict=True):
        expected = back(enhance(pillow(image)).enhance(factor))
        np.testing.assert_allclose(view.numpy() * 255, expected, atol=2.0)  # Pillow rounds the grey and the result


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.2, 0.5])
def test_hue_is_a_turn_of_the_standard_librarys_hsv(shift: float) -> None:
    x = images(2, size=6)
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 0, 2] = 0, 255, 77  # black, white and grey have no hue
    found = shift_hue(x.float() / 255, torch.full((2, 1, 1, 1), shift))
    for view, image in zip(found, x, strict=True):
        for row in range(6):
            for column in range(6):
                h, s, v = colorsys.rgb_to_hsv(*(image[:, row, column] / 255).tolist())
                expected = colorsys.hsv_to_rgb((h + shift) % 1, s, v)
                np.testing.assert_allclose(view[:, row, column].numpy(), expected, atol=1e-4)


def test_grey_is_pillows_mode_l() -> None:
    x = images(3)
    views = with_(grey=1.0)(x, seeded()) * 255
    for view, image in zip(views, x, strict=True):
        expected = np.asarray(pillow(image).convert("L"), np.float32)
        for channel in view:
            np.testing.assert_allclose(channel.numpy(), expected, atol=0.51)
    assert torch.equal(luma(x[:, :1].float()), x[:, :1].float())


def test_solarise_is_pillows() -> None:
    x = images(3)
    for view, image in zip(with_(solarise=1.0)(x, seeded()) * 255, x, strict=True):
        np.testing.assert_allclose(view.numpy(), back(ImageOps.solarize(pillow(image), 128)), atol=1e-2)


@pytest.mark.parametrize(("size", "radius"), [(28, 1), (96, 4)])
def test_blur_is_a_separable_gaussian_reflected_at_the_borders(size: int, radius: int) -> None:
    x = images(3, size=size).float() / 255
    deviations = (0.5, 1.1, 2.0)
    for view, image, sigma in zip(gaussian_blur(x, torch.tensor(deviations)), x, deviations, strict=True):
        taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        taps /= taps.sum()
        expected = correlate1d(correlate1d(image.numpy(), taps, axis=1, mode="mirror"), taps, axis=2, mode="mirror")
        np.testing.assert_allclose(view.numpy(), expected, atol=1e-5)
    torch.testing.assert_close(gaussian_blur(x, torch.zeros(3)), x)


def test_factors_are_drawn_for_each_image_within_their_range() -> None:
    changes = with_(jitter=0.8, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, grey=0.2, blur=0.5, solarise=0.1)
    draw, _ = changes.draw(20_000, seeded())
    chosen = draw.brightness != 1
    assert float(chosen.float().mean()) == pytest.approx(0.8, abs=0.01)
    assert torch.equal(chosen, draw.contrast != 1)  # torchvision chooses the jitter as a whole
    for factor, centre, spread in zip(draw[5:9], (1, 1, 1, 0), (0.4, 0.3, 0.2, 0.1), strict=True):
        assert float(factor[chosen].min()) == pytest.approx(centre - spread, abs=1e-3)
        assert float(factor[chosen].max()) == pytest.approx(centre + spread, abs=1e-3)
        assert len(factor.unique()) > 10_000
    for value, probability in ((draw.grey, 0.2), (draw.sigma, 0.5), (draw.solarise, 0.1)):
        assert float((value > 0).float().mean()) == pytest.approx(probability, abs=0.01)
    assert 0.1 <= float(draw.sigma[draw.sigma > 0].min()) < float(draw.sigma.max()) <= 2


def test_the_colour_operations_come_in_every_order() -> None:
    generator = seeded()
    orders = {tuple(Augmentation().draw(1, generator)[1]) for _ in range(500)}
    assert len(orders) == 24


def test_the_same_seed_gives_the_same_views_and_another_gives_others() -> None:
    changes, x = Augmentation(hue=0.1, saturation=0.2, grey=0.2, blur=0.5, solarise=0.2), images()
    first, again, other = (changes(x, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= float(first.min()) < float(first.max()) <= 1 + 1e-6
    assert len({tuple(view.flatten().tolist()) for view in changes(x[:1].expand(8, -1, -1, -1), Generator())}) == 8


def test_images_of_one_channel_have_no_colours_to_change() -> None:
    changes = with_(jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.5, hue=0.5, grey=1.0)
    x = images(channels=1)
    torch.testing.assert_close(changes(x, seeded()), x.float() / 255, atol=1e-5, rtol=0)
