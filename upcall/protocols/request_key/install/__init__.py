"""Reads request-key's configuration, and adds and removes upcall's lines. See docs/request-key.md."""
