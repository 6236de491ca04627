"""The template: train image diffusion models whose training run cannot be lost."""
