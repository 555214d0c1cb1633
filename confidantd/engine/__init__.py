"""ONNX Runtime sessions, optimizer and KV cache of one stage; no torch, no asyncio."""
