"""Readers on small files in the exact published formats, whole and damaged."""

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training.data import (
    SAMPLE,
    SOURCES,
    DataError,
    ImageSet,
    cifar,
    load_data,
    load_split,
    load_test,
    read_cifar10,
    read_cifar100,
    read_fashion_mnist,
    read_stl10,
    stl10,
)
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


@pytest.mark.parametrize(
    "images", [torch.rand(4, 1, 8, 8), torch.zeros(4, 8, 8).byte(), torch.zeros(4, 3, 8, 8).byte()]
)
def test_images_of_another_kind_are_named(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a plugin's reader may return them: floats would train as black images."""
    broken = replace(SOURCES["fashion"], read=lambda folder, split: ImageSet(images, torch.zeros(4).long()))
    monkeypatch.setitem(SOURCES, "fashion", broken)
    with pytest.raises(DataError, match=r"the images of fashion are \(4, .* must be \(n, 1, height, width\) uint8"):
        load_data("fashion", SAMPLE)


def test_an_empty_set_is_named(tmp_path: Path) -> None:
    for name in ("train", "t10k"):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte", torch.zeros(0, 28, 28))
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte", torch.zeros(0))
    for read in (load_data, load_test):
        with pytest.raises(DataError, match=r"the (train|test) set of fashion in \S+ is empty; unpack it again"):
            read("fashion", tmp_path)
    for name in ("train", "test"):
        batch = {"data": np.zeros((0, 3072), np.uint8), "fine_labels": []}
        (tmp_path / name).write_bytes(pickle.dumps(batch))
    with pytest.raises(DataError, match=r"the train set of cifar100 in \S+ is empty"):
        load_data("cifar100", tmp_path)


def test_a_cifar_label_out_of_range_is_damage(tmp_path: Path) -> None:
    write_cifar(tmp_path, "binary")
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    path.write_bytes(b"\x63" + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"outside 0\.\.9"):
        read_cifar10(tmp_path, "test")


def test_cifar100_has_a_coarse_label_before_its_fine_one(tmp_path: Path) -> None:
    pixels, labels = cifar_rows(6, 0)
    coarse, fine = np.zeros(6, np.uint8), np.array([10 * label + 9 for label in labels], np.uint8)
    binary = np.concatenate([coarse[:, None], fine[:, None], pixels], axis=1)
    (tmp_path / "cifar-100-binary").mkdir()
    for split in ("train", "test"):
        (tmp_path / "cifar-100-binary" / f"{split}.bin").write_bytes(binary.tobytes())
    (tmp_path / "python").mkdir()
    batch = {"data": pixels, "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
    (tmp_path / "python" / "train").write_bytes(pickle.dumps(batch, protocol=2))
    for found in (read_cifar100(tmp_path, "train"), read_cifar100(tmp_path / "python", "train")):
        assert found.labels.tolist() == fine.tolist()
        assert torch.equal(found.images.flatten(1), torch.from_numpy(pixels))
    (tmp_path / "python" / "train").write_bytes(b"no pickle")
    with pytest.raises(DataError, match="get cifar-100-binary"):
        read_cifar100(tmp_path / "python", "train")


def test_a_file_of_the_published_size_must_have_the_published_md5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, "python")
    monkeypatch.setitem(cifar.CIFAR10.published, "data_batch_2", (4, "0" * 32))
    with pytest.raises(DataError, match=r"data_batch_2: its MD5 is .*, the published one 0000"):
        read_cifar10(tmp_path, "train")
    digest = hashlib.md5((tmp_path / "cifar-10-batches-py" / "data_batch_2").read_bytes()).hexdigest()
    monkeypatch.setitem(cifar.CIFAR10.published, "data_batch_2", (4, digest))
    assert len(read_cifar10(tmp_path, "train")) == 20


def write_stl10(root: Path, n: int = 3) -> np.ndarray:
    """As published: bytes, channel after channel, each column by column; labels from 1 to 10."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3, 96, 96), dtype=np.uint8)  # (image, channel, row, column)
    (root / "stl10_binary").mkdir()
    for name in ("train", "test", "unlabeled"):
        (root / "stl10_binary" / f"{name}_X.bin").write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())
        (root / "stl10_binary" / f"{name}_y.bin").write_bytes(bytes([1, 10, 4][:n]))
    return pixels


def test_stl10_is_column_major_with_labels_from_one(tmp_path: Path) -> None:
    pixels = write_stl10(tmp_path)
    found = read_stl10(tmp_path, "test")
    assert np.array_equal(found.images.numpy(), pixels)
    assert found.labels.tolist() == [0, 9, 3]
    assert read_stl10(tmp_path, "unlabelled").labels.tolist() == [-1, -1, -1]


def test_damaged_stl10_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"train_X\.bin is missing; get stl10_binary"):
        read_stl10(tmp_path, "train")
    write_stl10(tmp_path)
    folder = tmp_path / "stl10_binary"
    monkeypatch.setitem(stl10.PUBLISHED, "unlabeled_X.bin", (3, "0" * 32))
    with pytest.raises(DataError, match=r"unlabeled_X\.bin: its MD5 is"):
        read_stl10(tmp_path, "unlabelled")
    (folder / "train_y.bin").write_bytes(bytes([1, 2]))
    with pytest.raises(DataError, match="2 labels for 3 images"):
        read_stl10(tmp_path, "train")
    (folder / "train_y.bin").write_bytes(bytes([1, 2, 11]))
    with pytest.raises(DataError, match=r"outside 1\.\.10"):
        read_stl10(tmp_path, "train")
    (folder / "train_X.bin").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="truncated"):
        read_stl10(tmp_path, "train")


def test_an_unlabelled_split_trains_and_the_labelled_one_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stl10(tmp_path)
    labelled = ImageSet(torch.zeros(50, 3, 96, 96, dtype=torch.uint8), torch.arange(50) % 10)
    plain = SOURCES["stl10"]

    def read(folder: Path, split: str) -> ImageSet:
        return labelled if split == "train" else read_stl10(folder, split)

    monkeypatch.setitem(SOURCES, "stl10", replace(plain, read=read))
    split = load_split("stl10", tmp_path, held_out=10, limit=2, seed=0)
    assert (len(split.fit), len(split.held_out), len(split.labelled)) == (2, 10, 40)
    assert isinstance(split.fit, ImageSet)
    assert split.fit.labels.tolist() == [-1, -1]
