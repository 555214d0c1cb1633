"""What runs programs: ONNX Runtime's CPU provider, and those that plugins bring."""
