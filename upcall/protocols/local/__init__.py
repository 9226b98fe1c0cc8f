"""Serves requesters in user space over a local socket."""
