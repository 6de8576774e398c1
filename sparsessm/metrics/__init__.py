"""Quality and speed of a model: perplexity, zero-shot accuracy, inference."""
