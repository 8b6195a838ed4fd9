"""The datasets under torchvision's name: ``from minidl.data import datasets, transforms``."""

from minidl.data.captions import CocoCaptions, Flickr8k
from minidl.data.cifar import CIFAR10
from minidl.data.digits import Digits
from minidl.data.folder import ImageFolder
from minidl.data.mnist import MNIST, FashionMNIST
from minidl.data.npz import NPZ
from minidl.data.scenes import ShapeScenes

__all__ = [
    "CIFAR10", "MNIST", "NPZ", "CocoCaptions", "Digits", "FashionMNIST", "Flickr8k", "ImageFolder",
    "ShapeScenes",
]  # fmt: skip
