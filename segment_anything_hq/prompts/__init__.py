"""Simulated clicks and sampled prompts."""
