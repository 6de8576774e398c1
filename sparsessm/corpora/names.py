"""The data sets that have a name."""

DATASETS = ("wikitext2", "ptb", "c4", "demo")

# What the model card names: their ids on the Hugging Face hub.
HUB_IDS = {"wikitext2": "Salesforce/wikitext", "ptb": "ptb-text-only/ptb_text_only", "c4": "allenai/c4"}
