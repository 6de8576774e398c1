import pytest
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_dir):
    return AutoTokenizer.from_pretrained(demo_dir)


@pytest.fixture
def private_cache(tmp_path_factory, monkeypatch):
    """Tables that `datasets` converts on the way must not land in the user's cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
