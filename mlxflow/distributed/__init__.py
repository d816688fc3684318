"""Training on several processes: launcher, supervisor, and the collectives of the ranks."""
