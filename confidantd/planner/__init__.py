"""From measured numbers to a plan that explains itself; pure functions."""
