"""What would become of a key that the kernel asked for: step by step, without asking for it. docs/request-key.md."""
