"""Settings for all tests; the fixtures that start processes are in upcall.testing."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "upcall", max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("upcall")
