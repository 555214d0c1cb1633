"""The local control API on the Unix socket."""
