"""request_key(2): the kernel starts a program for each key that it wants; ours asks the broker."""
