"""Fuzzes all decoders of untrusted input and the broker's core, guided by coverage. See docs/fuzzing.md."""
