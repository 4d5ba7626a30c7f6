"""What is learned: rows, batches, loss and held-out scores of a run; one file an objective."""
