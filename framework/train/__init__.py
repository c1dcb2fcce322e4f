"""Training: a driver, its ranks, one loop, two engines, and what watches them."""
