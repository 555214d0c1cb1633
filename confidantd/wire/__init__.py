"""Bytes on the wire: sans-I/O frames and message codecs."""
