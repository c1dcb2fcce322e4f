"""The path between data and noise, and how it is walked: samplers and guidance.

Plain torch; knows `framework.batch` and nothing of objectives, data, training or Ray."""
