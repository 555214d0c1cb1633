"""The confidant command, a thin client of the local daemon."""
