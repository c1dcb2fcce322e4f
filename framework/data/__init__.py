"""Clips and their way into training: shards, manifest, plan, stream."""
