"""ONNX: networks out to other programs and in again, and its operators on integers."""
