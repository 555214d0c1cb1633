"""Generating tokens: a stage as one program that the engine writes itself, and its cache."""
