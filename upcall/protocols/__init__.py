"""One folder for each kind of kernel upcall: all that upcall knows of it, from its bytes to its handlers."""
