"""The mathematics of pruning: tensors in, tensors out; no models, files or flags."""
