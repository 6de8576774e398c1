"""What a Mamba block computes: the block forward with taps and the selective scan under it."""
