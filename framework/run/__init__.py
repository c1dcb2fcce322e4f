"""A run's folder: whose it is, its checkpoints, its ledger and its logs."""
