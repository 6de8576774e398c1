"""The records of a run: its folder, its table row, and its page on Weights & Biases."""
