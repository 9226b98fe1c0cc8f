"""Benchmarks: ours beside a peer in C, in one run, as ratios. `python -m bench`; README.md explains the rows."""
