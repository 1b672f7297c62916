"""Scoring a test set from bundles inside a time budget, with a valid submission at every moment."""
