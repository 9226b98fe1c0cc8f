"""Routes requests to daemons, matches replies to message contexts, enforces deadlines. Pure: no I/O."""
