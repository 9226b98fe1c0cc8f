"""request-key's configuration on this machine: what it says, and our lines in it. docs/request-key.md tells more."""
