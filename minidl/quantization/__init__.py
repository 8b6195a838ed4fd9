"""Fewer bits: weights of 16 and 8 bits (lecture 2)."""

from minidl.quantization.weight_only import WeightOnlyLinear, weight_only

__all__ = ["WeightOnlyLinear", "weight_only"]
