"""Reports the state of upcall: doctor, metrics, records of requests, log lines."""
