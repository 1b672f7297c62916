"""Fitting: one loop for every task and model, folds and out-of-fold predictions."""
