"""Data: a source of images, decoded once into a cache, as an endless stream of batches."""
