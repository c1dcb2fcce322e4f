"""What watches a session: figures, the ledger, checkpoints, profiles."""
