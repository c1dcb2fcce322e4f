"""Which views of which clips form which pack of which step, written down ahead."""
