"""Torch blocks to ONNX programs; the only place that imports torch."""
