"""The stage worker process: runner and links."""
