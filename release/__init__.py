"""Builds wheels and sdists reproducibly: bit for bit the same on every machine."""
