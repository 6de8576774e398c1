"""What a Mamba mixer computes: the scans of both kinds, the convolution, matrix products."""
