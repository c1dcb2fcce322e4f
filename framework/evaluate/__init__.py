"""What a checkpoint is worth: validation loss, Fréchet distance and prompt following."""
