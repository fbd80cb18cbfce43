"""What carries all the rest, and knows nothing of brains."""
