"""Training engines: ZeRO, and its oracle in plain torch; optimizer and EMA."""
