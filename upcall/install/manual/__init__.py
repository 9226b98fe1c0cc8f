"""Generates manual pages from the commands' help texts and the registry of configuration keys.

So no page can differ from `--help`. `upcall setup` installs them where man searches.
"""
