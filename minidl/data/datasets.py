"""The datasets under torchvision's name: ``from minidl.data import datasets, transforms``."""

from minidl.data.cifar import CIFAR10
from minidl.data.digits import Digits
from minidl.data.folder import ImageFolder
from minidl.data.mnist import MNIST, FashionMNIST
from minidl.data.npz import NPZ

__all__ = ["CIFAR10", "MNIST", "NPZ", "Digits", "FashionMNIST", "ImageFolder"]
