"""Clips encoded ahead, once, and read by training in place of videos."""
