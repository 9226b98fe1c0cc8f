"""Starts and stops daemons by PAM, on machines without systemd: at a user's first session, and at the end of the
last. docs/operations.md tells more."""
