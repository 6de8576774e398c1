import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.family import random_model_of


@pytest.fixture
def checkpoint_of(tmp_path, demo_dir):
    """checkpoint_of(kind, **config) saves a small model of any architecture with the demo's tokenizer; the folder."""

    def make(kind: str, **sizes: Any) -> Path:
        folder = tmp_path / kind
        random_model_of(kind, **{"vocab_size": 4096, **sizes}).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_dir / file, folder)
        return folder

    return make


@pytest.fixture
def saved(tmp_path, tiny_model) -> Path:
    tiny_model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"
