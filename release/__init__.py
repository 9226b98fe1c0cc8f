"""Wheels and sdists that are the same, bit for bit, whoever builds them and wherever."""
