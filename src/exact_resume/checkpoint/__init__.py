"""Checkpoints: the store, its background writer, the schema, and comparing bit by bit."""
