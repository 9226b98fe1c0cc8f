"""Manual pages: made of the help texts of the commands and of the registry of keys, when somebody wants them.

So no page is kept anywhere that could say something else than `--help`. `upcall setup` puts them where man looks.
"""
