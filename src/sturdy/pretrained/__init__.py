"""Models that others trained: what they are, their parts, and how to train them further."""
