"""A server that draws images from a run."""
