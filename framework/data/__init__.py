"""Clips and their way into training: manifest, plan, stream, and the demo's synthetic clips."""
