"""Fewer bits: weights of 16, 8 and 4 bits (lecture 2)."""

from minidl.quantization.fuse import ConvReLU2d, fuse
from minidl.quantization.half import half
from minidl.quantization.observers import OBSERVERS
from minidl.quantization.qat import convert, prepare_qat
from minidl.quantization.quantize import quantize
from minidl.quantization.static import Quantized
from minidl.quantization.weight_only import WeightOnlyLinear, weight_only

__all__ = [
    "OBSERVERS",
    "ConvReLU2d",
    "Quantized",
    "WeightOnlyLinear",
    "convert",
    "fuse",
    "half",
    "prepare_qat",
    "quantize",
    "weight_only",
]
