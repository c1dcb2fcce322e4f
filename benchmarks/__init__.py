"""Benchmarks: one file a question; results dated, in results/."""
