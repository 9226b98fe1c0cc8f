"""Keys that a user has enrolled: where they are, how they are opened, where passphrases come from."""
