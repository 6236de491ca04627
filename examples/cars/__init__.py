"""Drawn cars, and a backbone for aligned images: see README.md."""
