"""Enrols, stores and opens a user's keys, loads key modules, and obtains passphrases."""
