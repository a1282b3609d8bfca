"""How big a checkpoint is, from its config.json alone: one file, one kind, `SHAPE` counts it."""
