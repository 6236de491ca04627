"""Draw images from a run: the settings, the run that is loaded, and the files."""
