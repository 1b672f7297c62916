"""What a run gave, to look at."""
