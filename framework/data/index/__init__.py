"""Shards, or a table of files, to a manifest."""
