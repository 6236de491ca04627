"""A package outside the project: a part of every kind, and the options that choose them."""
