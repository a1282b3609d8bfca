"""Reading a checkpoint's folder: configs, weights, preprocessor, chat template, labels."""
