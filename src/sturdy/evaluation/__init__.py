"""Judge the images of a run: features, distances and the sections of a report."""
