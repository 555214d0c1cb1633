"""Mutual TLS connections between paired devices."""
