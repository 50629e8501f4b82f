"""Readers of data sets in their published formats. Small ones are held in memory as uint8, large ones are streamed."""

from pathlib import Path

from training.data.cifar import read_cifar10, read_cifar100
from training.data.dataset import DataError, Images, ImageSet
from training.data.files import FileSet, ShardSet, read_folder
from training.data.idx import read_fashion_mnist
from training.data.sources import SOURCES, Source
from training.data.split import Split, chunks_of, load_data, load_split, load_test
from training.data.stl10 import read_stl10

SAMPLE = Path(__file__).parent / "fashion-sample"
"""About 2,000 Fashion-MNIST images in the IDX format, in the repository for tests and demonstrations."""

__all__ = [
    "SAMPLE",
    "SOURCES",
    "DataError",
    "FileSet",
    "ImageSet",
    "Images",
    "ShardSet",
    "Source",
    "Split",
    "chunks_of",
    "load_data",
    "load_split",
    "load_test",
    "read_cifar10",
    "read_cifar100",
    "read_fashion_mnist",
    "read_folder",
    "read_stl10",
]
