"""Rounds of echoes."""
