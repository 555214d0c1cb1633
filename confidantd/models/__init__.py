"""What a model is: specs, families, checkpoint files; no torch."""
