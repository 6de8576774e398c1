from pathlib import Path
from typing import Any

import pytest

from tests.family import family_checkpoint


@pytest.fixture
def checkpoint_of(tmp_path, demo_dir):
    """checkpoint_of(kind, **config) saves a small model of any architecture with the demo's tokenizer; the folder."""

    def make(kind: str, **sizes: Any) -> Path:
        return family_checkpoint(tmp_path / kind, demo_dir, kind, **sizes)

    return make


@pytest.fixture
def saved(tmp_path, tiny_model) -> Path:
    tiny_model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"
