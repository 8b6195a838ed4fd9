"""ONNX: networks out to other programs and in again, and its operators on integers.

    minidl.onnx.export(model, images, "m.onnx")

(Inside minidl, ``import onnx`` is the package of that name, which reads and writes the files.)
"""

from minidl.onnx.export import export

__all__ = ["export"]
