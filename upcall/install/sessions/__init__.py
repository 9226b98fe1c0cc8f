"""Starts and stops daemons by PAM, on machines without systemd: at a user's first login and last logout.

See docs/operations.md.
"""
