"""Other libraries: their weights in our model, ours in theirs."""
