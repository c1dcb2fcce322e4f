"""Figures of a run, a meter a file."""
