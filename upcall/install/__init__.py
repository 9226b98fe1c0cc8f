"""Installs and removes upcall's services on a machine. See docs/operations.md."""
