"""`upcall explain`: shows step by step how a key request would be answered, without making it. docs/request-key.md."""
