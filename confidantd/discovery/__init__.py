"""Finding devices over mDNS on every usable interface."""
