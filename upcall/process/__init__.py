"""What every process of ours has: log, waker, SIGHUP, hardening, trust of files, paths."""
