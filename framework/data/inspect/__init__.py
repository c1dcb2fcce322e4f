"""A page that shows what a plan will do."""
