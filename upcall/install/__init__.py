"""upcall's services on a machine: what belongs there, what was put there by us, and how it goes again.
docs/operations.md tells more."""
