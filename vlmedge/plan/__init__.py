"""Whether a model fits on a device, and how fast it runs there, before anything is exported."""
