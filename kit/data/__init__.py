"""Tables in, folds and warnings out: reading and checking files, splitting rows, finding leakage. Knows no task and no model."""
