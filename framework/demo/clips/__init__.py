"""Captioned clips of moving shapes."""
