"""Measures upcall against peers in C, in one run, as ratios: `python -m bench`. README.md explains the rows."""
