"""Each operation against Pillow or a plain reference, the draws themselves, and the randomness per image."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Generator

from training.augment import Augmentation, _binomial, _rectangles

IDENTITY = Augmentation(crop=(1, 1), ratio=(1, 1), flip=0, jitter=0, blur=0, erase=0)


def images(n: int = 16, channels: int = 1, size: int = 28) -> torch.Tensor:
    generator = Generator().manual_seed(3)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def with_(**changes: object) -> Augmentation:
    return Augmentation(**{**IDENTITY.__dict__, **changes})  # type: ignore[arg-type]


def test_nothing_asked_changes_nothing() -> None:
    x = images(channels=3)
    torch.testing.assert_close(IDENTITY(x, Generator().manual_seed(0)), x.float() / 255, atol=1e-5, rtol=0)


def test_a_certain_flip_is_a_mirror() -> None:
    x = images()
    torch.testing.assert_close(
        with_(flip=1.0)(x, Generator().manual_seed(0)), (x.float() / 255).flip(-1), atol=1e-5, rtol=0
    )


def test_a_crop_is_the_resampled_box_that_pillow_makes() -> None:
    """A smooth ramp, because grid_sample and Pillow weigh neighbours differently only where the image bends."""
    ramp = torch.arange(28).view(1, 28).expand(28, 28) * 8
    x = ramp.to(torch.uint8).expand(4, 1, 28, 28).contiguous()
    views = with_(crop=(0.25, 0.25))(x, Generator().manual_seed(5))
    pillow = Image.fromarray(x[0, 0].numpy())
    for view in views:
        left = float(view[0, 0, 1] * 255 / 8) + 0.5 - 14 / 28 * 1.5
        box = (left, 7.0, left + 14, 21.0)
        expected = np.asarray(pillow.resize((28, 28), Image.Resampling.BILINEAR, box=box), np.float32)
        np.testing.assert_allclose(view[0, :, 2:-2].numpy() * 255, expected[:, 2:-2], atol=1.01)


def test_crops_cover_their_range_of_areas() -> None:
    """On an image that is its own x coordinate, the spread of a view tells the width of its crop."""
    x = torch.arange(28).view(1, 28).expand(28, 28).mul(9).to(torch.uint8).expand(4000, 1, 28, 28)
    views = with_(crop=(0.3, 0.8), ratio=(1, 1))(x, Generator().manual_seed(0)) * 255 / 9
    width = (views[:, 0, 14, 20] - views[:, 0, 14, 8]) / 12
    area = width**2
    assert 0.28 < float(area.min()) < 0.32
    assert 0.78 < float(area.max()) < 0.82
    assert float(area.mean()) == pytest.approx(0.55, abs=0.01)


def test_brightness_and_contrast_are_drawn_for_each_image() -> None:
    x = images(512)
    bright = with_(jitter=1.0, brightness=0.5, contrast=0.0)(x // 4, Generator().manual_seed(0))
    factor = bright.mean(dim=(1, 2, 3)) / (x // 4).float().div(255).mean(dim=(1, 2, 3))
    assert 0.5 <= float(factor.min()) < 0.55
    assert 1.45 < float(factor.max()) <= 1.5
    assert len(factor.unique()) > 500


def test_contrast_keeps_the_mean_and_scales_the_rest() -> None:
    x = (images(64) // 4 + 90).to(torch.uint8)
    y = with_(jitter=1.0, brightness=0.0, contrast=0.3)(x, Generator().manual_seed(0))
    plain = x.float() / 255
    torch.testing.assert_close(y.mean(dim=(1, 2, 3)), plain.mean(dim=(1, 2, 3)), atol=1e-5, rtol=0)
    ratio = y.std(dim=(1, 2, 3)) / plain.std(dim=(1, 2, 3))
    assert 0.7 - 1e-4 <= float(ratio.min()) < float(ratio.max()) <= 1.3 + 1e-4


def test_blur_is_pillows_kernel() -> None:
    x = images(3)
    kernel = ImageFilter.Kernel((3, 3), [1, 2, 1, 2, 4, 2, 1, 2, 1])
    for blurred, image in zip(_binomial(x.float()), x, strict=True):
        expected = np.asarray(Image.fromarray(image[0].numpy()).filter(kernel), np.float32)
        np.testing.assert_allclose(blurred[0, 1:-1, 1:-1].numpy(), expected[1:-1, 1:-1], atol=0.51)


def test_erased_regions_are_rectangles_up_to_half_a_side() -> None:
    masks = _rectangles(images(1000), Generator().manual_seed(0))
    for mask in masks[:, 0]:
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        if len(rows):
            inside = mask[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
            assert inside.all()
            assert max(inside.shape) <= 15
    assert float(masks.float().mean()) == pytest.approx(1 / 16, rel=0.15)


def test_the_same_seed_gives_the_same_views_and_another_gives_others() -> None:
    augment, x = Augmentation(blur=0.5, erase=0.5), images()
    first, again, other = (augment(x, Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(view.flatten().tolist()) for view in augment(x[:1].expand(8, -1, -1, -1), Generator())}) == 8
