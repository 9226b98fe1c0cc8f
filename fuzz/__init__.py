"""Coverage-guided fuzzing of every decoder of what comes from outside, and of the broker's core. docs/fuzzing.md."""
