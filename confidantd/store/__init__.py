"""Content-addressed files, fetched by verified ranges."""
