"""Datasets, and the loader that makes batches of them.

Where to read first: `dataset.py`, `loader.py`; `randomness.py` for how augmentation stays the
same whoever loads it.
"""

from minidl.data import datasets, transforms
from minidl.data.captions import CaptionDataset, CocoCaptions, Flickr8k
from minidl.data.cifar import CIFAR10
from minidl.data.collate import default_collate, default_convert
from minidl.data.dataset import (
    ConcatDataset,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    random_split,
)
from minidl.data.digits import Digits, DigitStrings
from minidl.data.errors import DataError, MissingDataError
from minidl.data.folder import ImageFolder
from minidl.data.image import ImageDataset
from minidl.data.loader import DataLoader
from minidl.data.mnist import MNIST, FashionMNIST, read_idx
from minidl.data.npz import NPZ
from minidl.data.randomness import sample_rng, sample_rngs
from minidl.data.sampler import BatchSampler, RandomSampler, Sampler, SequentialSampler
from minidl.data.scenes import ShapeScenes
from minidl.data.workers import WorkerInfo, get_worker_info

__all__ = [
    "CIFAR10",
    "MNIST",
    "NPZ",
    "BatchSampler",
    "CaptionDataset",
    "CocoCaptions",
    "ConcatDataset",
    "DataError",
    "DataLoader",
    "Dataset",
    "DigitStrings",
    "Digits",
    "FashionMNIST",
    "Flickr8k",
    "ImageDataset",
    "ImageFolder",
    "IterableDataset",
    "MissingDataError",
    "RandomSampler",
    "Sampler",
    "SequentialSampler",
    "ShapeScenes",
    "Subset",
    "TensorDataset",
    "WorkerInfo",
    "datasets",
    "default_collate",
    "default_convert",
    "get_worker_info",
    "random_split",
    "read_idx",
    "sample_rng",
    "sample_rngs",
    "transforms",
]
