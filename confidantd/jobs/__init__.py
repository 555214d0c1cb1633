"""Training and generation jobs, from request to result."""
