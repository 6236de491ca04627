"""A tiny Stable Diffusion with random weights: see README.md."""
