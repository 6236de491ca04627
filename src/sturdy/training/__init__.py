"""Training: the LightningModule, its averages and optimizer, and one start of a run."""
