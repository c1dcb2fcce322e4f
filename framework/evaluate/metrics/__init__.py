"""Metrics of a checkpoint, a file each."""
