"""Trains encoders: methods, data sets, augmentation, the training loop, evaluation and recipes."""
