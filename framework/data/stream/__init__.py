"""The plan carried out: clips fetched, decoded, encoded and packed, in its order."""
