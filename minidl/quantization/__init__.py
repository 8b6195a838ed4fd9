"""Fewer bits: weights of 16 and 8 bits (lecture 2)."""

from minidl.quantization.fuse import ConvReLU2d, fuse
from minidl.quantization.half import half
from minidl.quantization.observers import OBSERVERS
from minidl.quantization.qat import convert, prepare_qat
from minidl.quantization.weight_only import WeightOnlyLinear, weight_only

__all__ = [
    "OBSERVERS",
    "ConvReLU2d",
    "WeightOnlyLinear",
    "convert",
    "fuse",
    "half",
    "prepare_qat",
    "weight_only",
]
