"""LoRA adapters: PEFT's files, merging at export, and slots that are filled at run time."""
