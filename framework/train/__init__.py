"""Training: one loop, two engines (ZeRO-3 and its oracle in plain torch), optimizer and EMA."""
