"""Training networks: one loop for every model, which knows none of them by name."""
