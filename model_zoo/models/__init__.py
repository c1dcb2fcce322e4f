"""Denoisers, one file each."""
