"""Installs and removes upcall's services on a machine.
docs/operations.md tells more."""
