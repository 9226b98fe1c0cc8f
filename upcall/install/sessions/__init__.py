"""Logins counted by PAM, for machines without systemd: a daemon starts with a user's first session and ends with the
last. docs/operations.md tells more."""
