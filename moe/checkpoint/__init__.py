"""Training checkpoints: `step-N/` folders with a manifest, read on any number of ranks."""
