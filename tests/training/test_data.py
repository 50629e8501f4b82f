"""Readers on small files in the exact published formats, whole and damaged."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from training.data import SAMPLE, DataError, read_cifar10, read_fashion_mnist
from training.data.idx import read_idx, write_idx


def test_the_sample_in_the_repository_is_balanced_fashion_mnist() -> None:
    for split in ("train", "test"):
        sample = read_fashion_mnist(SAMPLE, split)
        assert sample.images.shape == (1000, 1, 28, 28)
        assert sample.images.dtype == torch.uint8
        assert sample.labels.bincount().tolist() == [100] * 10


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_survives_a_round_trip(tmp_path: Path, suffix: str) -> None:
    array = torch.randint(0, 256, (7, 5, 3), dtype=torch.uint8)
    path = tmp_path / f"x-idx3-ubyte{suffix}"
    write_idx(path, array)
    assert torch.equal(read_idx(path, dimensions=3), array)


def test_idx_is_big_endian_as_published(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 9]))
    assert read_idx(path, dimensions=1).tolist() == [5, 9]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data + b"x", "promises"),
        (lambda data: b"\x00\x00\x0d\x03" + data[4:], "not an IDX file"),
        (lambda data: data[:6], "not an IDX file"),
        (lambda data: b"", "not an IDX file"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "images"
    write_idx(path, torch.zeros(4, 3, 3))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        read_idx(path, dimensions=3)
    assert str(path) in str(error.value)


def test_a_truncated_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    write_idx(path, torch.zeros(100, 28, 28))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="truncated or damaged gzip"):
        read_idx(path, dimensions=3)


def test_a_missing_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        read_fashion_mnist(tmp_path, "train")
    with pytest.raises(DataError, match="kriz/cifar"):
        read_cifar10(tmp_path, "train")


def cifar_rows(n: int, seed: int) -> tuple[np.ndarray, list[int]]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, 3072), dtype=np.uint8), generator.integers(0, 10, n).tolist()


def write_cifar(root: Path, form: str) -> None:
    """As the two published archives unpack: the binary rows, or protocol-2 pickles with Python 2's string keys."""
    folder = root / ("cifar-10-batches-bin" if form == "binary" else "cifar-10-batches-py")
    folder.mkdir()
    for seed, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        pixels, labels = cifar_rows(4, seed)
        if form == "binary":
            rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            batch = {"batch_label": name, "labels": labels, "data": pixels, "filenames": ["x.png"] * 4}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def test_both_forms_of_cifar10_read_the_same(tmp_path: Path) -> None:
    read = {}
    for form in ("binary", "python"):
        (tmp_path / form).mkdir()
        write_cifar(tmp_path / form, form)
        read[form] = read_cifar10(tmp_path / form, "train")
        assert len(read_cifar10(tmp_path / form, "test")) == 4
    assert torch.equal(read["binary"].images, read["python"].images)
    assert torch.equal(read["binary"].labels, read["python"].labels)
    assert read["binary"].images.shape == (20, 3, 32, 32)
    pixels, labels = cifar_rows(4, 0)
    assert read["binary"].images[1, 2, 0, 5] == pixels[1, 2 * 1024 + 5]  # red plane, green, blue, each row by row
    assert read["binary"].labels[:4].tolist() == labels


def test_a_truncated_cifar_batch_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, "binary")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*truncated"):
        read_cifar10(tmp_path, "train")


def test_a_cifar_pickle_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    write_cifar(tmp_path, "python")
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    with pytest.raises(DataError, match="refused to load"):
        read_cifar10(tmp_path, "train")
    assert not (tmp_path / "ran").exists()


def test_a_cifar_label_out_of_range_is_damage(tmp_path: Path) -> None:
    write_cifar(tmp_path, "binary")
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(b"\x63" + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"outside 0\.\.9"):
        read_cifar10(tmp_path, "test")
