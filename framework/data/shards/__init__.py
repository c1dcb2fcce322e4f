"""Shards in a store: tars, and byte ranges of what is in them."""
