"""Hypothesis on a busy machine."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# its first draw reads the sources of all loaded modules for constants, which is seconds where others work too
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
