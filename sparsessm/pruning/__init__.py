"""The mathematics of pruning: tensors in, tensors out; knows no model, no file and no flag."""
