"""Loggers beside ``metrics.csv``."""
