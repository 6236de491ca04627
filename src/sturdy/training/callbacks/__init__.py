"""Callbacks of the training of diffusion models."""
