"""The built-in trained tiny checkpoints, one folder each in Hugging Face layout."""
