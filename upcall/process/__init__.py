"""What every process of upcall uses: log, wake-up, SIGHUP, privilege dropping, trust of files, paths."""
