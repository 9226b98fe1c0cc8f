"""Requesters in user space, over a local socket."""
