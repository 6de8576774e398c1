"""What a run leaves behind: its folder, its table row, and its page on Weights & Biases."""
