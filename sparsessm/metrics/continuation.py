"""How a model continues a text."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from sparsessm.models.stock import stock_torch_path

# Tokens that are written.
LENGTH = 40


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, text: str, device: torch.device) -> str:
    """The text with the next LENGTH tokens, each the likeliest, or up to the end of the text that the model sees.

    The model computes on the device, by stock transformers, and goes back to where it was.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].to(device)
    home = next(model.parameters()).device
    model.to(device)
    try:
        with stock_torch_path(model) if device.type == "cpu" else nullcontext():
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, max_new_tokens=LENGTH,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )  # fmt: skip
    finally:
        model.to(home)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))
