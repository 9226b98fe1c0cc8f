"""eCryptfs public-key messaging: /dev/ecryptfs, its packets, and the handler of "ecryptfs" and "key"."""
