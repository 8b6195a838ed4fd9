"""ONNX: networks out to other programs and in again, and its operators on integers.

    minidl.onnx.export(model, images, "m.onnx")     # float, or what `quantize` made
    model = minidl.onnx.load("m.onnx")              # a module to run, train and quantize; or, of a
                                                    # file with rounding in it, one on integers
    minidl.onnx.operators.qlinear_conv(...)

(Inside minidl, ``import onnx`` is the package of that name, which reads and writes the files.)
"""

from minidl.onnx import operators
from minidl.onnx.export import export
from minidl.onnx.load import GraphModule, load

__all__ = ["GraphModule", "export", "load", "operators"]
