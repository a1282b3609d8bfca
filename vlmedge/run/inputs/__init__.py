"""Pictures, videos and texts as tensors: one file for each modality."""
