"""Small frozen networks, their features, and sets of images."""
