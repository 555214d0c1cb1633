"""This device's key and certificate, and the certificates it trusts."""
