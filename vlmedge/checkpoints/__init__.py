"""All that CHECKPOINT can name, and the trained checkpoints that ship with vlmedge."""
