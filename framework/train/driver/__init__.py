"""The process in which the command was given: it starts the ranks and follows them."""
