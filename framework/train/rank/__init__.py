"""One process of training: set up, resume, train, commit."""
