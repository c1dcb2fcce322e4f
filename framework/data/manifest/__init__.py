"""The clip table, one row a clip: reading, writing and filtering it."""
