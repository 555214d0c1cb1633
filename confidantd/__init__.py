"""Confidant: devices on one network fine-tune and run a transformer LLM together."""

__version__ = "0.1.0"
