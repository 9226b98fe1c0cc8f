"""Coverage-guided fuzzing of every decoder of bytes or text from outside, and of the broker's core. docs/fuzzing.md."""
