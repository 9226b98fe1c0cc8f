"""Runs an hour's load in ten minutes, and checks for growth of resources and for lost or repeated answers."""
