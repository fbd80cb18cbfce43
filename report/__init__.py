"""What is looked at: figures and the page of a run."""
