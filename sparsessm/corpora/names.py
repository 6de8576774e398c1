"""The data sets that have a name."""

DATASETS = ("wikitext2", "ptb", "c4", "demo")
