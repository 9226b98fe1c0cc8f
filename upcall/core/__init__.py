"""Contexts, registry, router: who is asked, which reply fits, when a request is over. Pure."""
