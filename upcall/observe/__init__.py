"""Seeing what goes on: doctor, metrics, request records, the log's lines."""
