"""Generates manual pages from the commands' help texts and the registry of configuration keys.

So no page is kept anywhere that could say something else than `--help`. `upcall setup` puts them where man looks.
"""
