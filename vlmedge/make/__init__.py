"""From a checkpoint to a verified bundle: export, quantize, calibrate, check, write."""
