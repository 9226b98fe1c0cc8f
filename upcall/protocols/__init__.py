"""Implements each kind of kernel upcall in a folder of its own, from its bytes to its handlers."""
