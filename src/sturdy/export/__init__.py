"""A run in the formats of other programs, read back by these before it counts."""
