"""The template: train image diffusion models whose training run cannot be lost."""

import exact_resume  # noqa: F401 (before Lightning, see exact_resume.lazy_transformers)
