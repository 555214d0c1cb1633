"""What this device has and how fast it is."""
