"""Hypothesis settings: the same examples in every run, and no deadline, as CI machines can be slow."""

from hypothesis import settings

settings.register_profile("milora", deadline=None, derandomize=True)
settings.load_profile("milora")
