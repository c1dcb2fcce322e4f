"""What a run tells the world: the tracker behind its journal, and gauges."""
