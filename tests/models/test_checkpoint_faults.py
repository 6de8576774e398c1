"""What is said of checkpoints that are broken or refused: one line, before or while their tensors are read."""

import json
import re
from pathlib import Path

import pytest
import torch

from sparsessm.errors import InputError
from sparsessm.models import checkpoint, tokenizing
from sparsessm.models.tokenizing import load_tokenizer
from tests.checkpoints import complaint, rewrite_config, rewrite_tensors, write_state_spaces


def test_no_such_folder():
    assert "no folder" in complaint("./no-such-folder")
    assert "no folder" in complaint("a/b/c")
    assert "/no-such-folder" in complaint("/no-such-folder")


def test_a_name_that_is_neither_a_folder_nor_at_hand():
    assert "neither a folder" in complaint("no-such-model-anywhere")
    assert complaint("what? no!")
    assert complaint("")


def test_a_file_instead_of_a_folder(saved):
    assert "is a file" in complaint(saved / "model.safetensors")


def test_no_config(saved):
    (saved / "config.json").unlink()
    assert "config.json" in complaint(saved)


def test_an_empty_folder(tmp_path):
    assert "config.json" in complaint(tmp_path)


@pytest.mark.parametrize("text", ["{", "", "[]", "3", '"mamba"', "null"])
def test_an_invalid_config(saved, text):
    (saved / "config.json").write_text(text)
    assert complaint(saved)


def test_a_config_with_nonsense_in_it(saved):
    rewrite_config(saved, hidden_size="wide")
    assert complaint(saved)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3_next", "kimi_linear", "t5", "qwen2_vl", None])
def test_an_architecture_that_is_not_known(saved, kind):
    rewrite_config(saved, model_type=kind)
    said = complaint(saved)
    assert f"is not a model that can be pruned here (model_type {kind!r}): known are mamba, falcon_mamba, mamba2" in said


def test_the_sizes_of_another_architecture(saved):
    rewrite_config(saved, model_type="mamba2")
    assert "describes no model" in complaint(saved) and "num_heads * head_dim" in complaint(saved)
    rewrite_config(saved, num_heads=8, head_dim=4, n_groups=1)
    assert "A_log has shape (32, 6), the config says (8,)" in complaint(saved)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"ssm_cfg": {"layer": "Mamba3"}}, "layers of the kind Mamba3: known are Mamba1, Mamba2"),
     ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 4}}, "is a hybrid"), ({"d_intermediate": 64}, "is a hybrid")],
    ids=str,
)  # fmt: skip
def test_other_kinds_and_hybrids_in_the_state_spaces_layout(tmp_path, tiny_model, changes, says):
    folder = write_state_spaces(tmp_path / "original", tiny_model(), **changes)
    assert says in complaint(folder)


def test_layer_norm_in_the_state_spaces_layout(tmp_path, tiny_model):
    assert "LayerNorm" in complaint(write_state_spaces(tmp_path / "original", tiny_model(), rms_norm=False))


def test_no_weights(saved):
    (saved / "model.safetensors").unlink()
    assert "weights" in complaint(saved)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_truncated_safetensors_are_found_before_they_are_read(saved, keep):
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=r"model.safetensors"):
        checkpoint.find(str(saved))
    assert "model.safetensors" in complaint(saved)


@pytest.mark.parametrize("header", [b"[]", b"3", b"{]", b'{"a": 3}', b"\xff\xfe\xfd"])
def test_safetensors_with_a_header_that_is_invalid(saved, header):
    (saved / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "model.safetensors" in complaint(saved)


def test_a_git_lfs_pointer_in_the_place_of_weights(saved):
    (saved / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9193952\n")
    assert "model.safetensors" in complaint(saved)


def test_a_missing_shard(tmp_path, tiny_model):
    tiny_model().save_pretrained(tmp_path / "saved", max_shard_size="12kB")
    gone = sorted((tmp_path / "saved").glob("model-*.safetensors"))[1]
    gone.unlink()
    assert gone.name in complaint(tmp_path / "saved")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}'])
def test_an_index_that_is_invalid(saved, text):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(text)
    assert complaint(saved)


def test_a_missing_tensor(saved):
    rewrite_tensors(saved, lambda tensors: tensors.pop("backbone.layers.1.mixer.A_log"))
    assert "backbone.layers.1.mixer.A_log" in complaint(saved)


def test_a_tensor_too_many(saved):
    rewrite_tensors(saved, lambda tensors: tensors.update({"backbone.layers.7.mixer.A_log": torch.zeros(2)}))
    assert "backbone.layers.7.mixer.A_log" in complaint(saved)


def test_a_tensor_of_another_shape(saved):
    def change(tensors):
        tensors["backbone.layers.0.mixer.A_log"] = torch.zeros(32, 7)

    rewrite_tensors(saved, change)
    message = complaint(saved)
    assert "backbone.layers.0.mixer.A_log" in message and "(32, 7)" in message and "(32, 6)" in message


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 broken zip"])
def test_a_broken_bin(saved, content):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in complaint(saved)


def test_a_truncated_bin(saved, tiny_model):
    (saved / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), saved / "pytorch_model.bin")
    content = (saved / "pytorch_model.bin").read_bytes()
    (saved / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    assert "pytorch_model.bin" in complaint(saved)


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {"backbone.norm_f.weight": 3}, torch.zeros(3), {}], ids=str)
def test_a_bin_that_holds_something_else(saved, content):
    (saved / "model.safetensors").unlink()
    torch.save(content, saved / "pytorch_model.bin")
    assert complaint(saved)


class Payload:
    """What a malicious pickle would run on loading."""

    def __reduce__(self):
        return (Path.touch, (Path("ran-by-pickle"),))


def test_a_bin_runs_no_code(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (saved / "model.safetensors").unlink()
    torch.save({"backbone.embeddings.weight": Payload()}, saved / "pytorch_model.bin")
    assert "pytorch_model.bin" in complaint(saved)
    assert not (tmp_path / "ran-by-pickle").exists()


def test_torch_load_is_called_with_weights_only_wherever_it_is():
    root = Path(checkpoint.__file__).resolve().parents[1]
    for file in [*root.rglob("*.py"), root.parent / "main.py", *(root.parent / "scripts").glob("*.py")]:
        for call in re.findall(r"torch\.load\((.*)", file.read_text()):
            assert "weights_only=True" in call, file


def test_no_tokenizer_at_hand(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(tokenizing, "FALLBACK_TOKENIZER", str(tmp_path / "nowhere"))
    folder = write_state_spaces(tmp_path / "original", tiny_model())
    with pytest.raises(InputError, match=r"tokenizer.json") as caught:
        load_tokenizer(checkpoint.find(str(folder)))
    assert "\n" not in str(caught.value)


def test_a_broken_tokenizer(tiny_checkpoint):
    folder = tiny_checkpoint()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError) as caught:
        load_tokenizer(checkpoint.find(str(folder)))
    assert "\n" not in str(caught.value)


def test_the_state_spaces_layout_falls_back_to_the_neox_tokenizer(tmp_path, tiny_model, shared_dir, monkeypatch):
    assert tokenizing.FALLBACK_TOKENIZER == "EleutherAI/gpt-neox-20b"
    monkeypatch.setattr(tokenizing, "FALLBACK_TOKENIZER", str(shared_dir / "tokenizers" / "gpt-neox-20b"))
    folder = write_state_spaces(tmp_path / "original", tiny_model(vocab_size=50280), vocab_size=50277)
    assert len(load_tokenizer(checkpoint.find(str(folder)))) == 50277
    small = write_state_spaces(tmp_path / "small", tiny_model())
    with pytest.raises(InputError, match="does not fit the model: it makes the ids 0 to 50276, the embedding has 64 rows"):
        load_tokenizer(checkpoint.find(str(small)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised weights"),
     ({"transformers_weights": "other.safetensors"}, "names other weight files")],
    ids=str,
)  # fmt: skip
def test_configs_that_are_refused(saved, changes, says):
    rewrite_config(saved, **changes)
    assert says in complaint(saved)


def test_an_adapter_is_refused(saved):
    (saved / "adapter_config.json").write_text("{}")
    assert "adapter" in complaint(saved) and "merge" in complaint(saved)


SSM = {"d_state": 6, "dt_rank": 3}


@pytest.mark.parametrize(
    ("key", "changes"),
    [("d_attn", {"d_attn": 3}), *((key, {"ssm_cfg": {**SSM, key: 8}}) for key in ("chunk_size", "headdim"))],
)
def test_keys_that_the_state_spaces_layout_has_not(tmp_path, tiny_model, key, changes):
    folder = write_state_spaces(tmp_path / "original", tiny_model(), **changes)
    assert f"keys that no Mamba1 model of this layout has: {key}" in complaint(folder)


def test_a_state_spaces_head_that_its_config_denies(tmp_path, tiny_model):
    folder = write_state_spaces(tmp_path / "original", tiny_model(tie_word_embeddings=False))
    assert "set tie_embeddings to false" in complaint(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors"])
def test_an_index_that_names_files_outside_the_folder(saved, name):
    (saved / "model.safetensors").rename(saved.parent / "secret.safetensors")
    index = {"weight_map": {"backbone.norm_f.weight": name}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside the model's folder" in complaint(saved)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 5000])
def test_a_generation_config_that_is_invalid(saved, text):
    (saved / "generation_config.json").write_text(text)
    assert "generation_config.json" in complaint(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(saved, value):
    rewrite_tensors(saved, lambda tensors: tensors["backbone.layers.1.mixer.D"][3:4].fill_(value))
    assert "backbone.layers.1.mixer.D has values that are not finite: the weights are broken" in complaint(saved)


def test_weights_that_the_dtype_cannot_hold_are_named(saved):
    rewrite_tensors(saved, lambda tensors: tensors["backbone.layers.1.mixer.in_proj.weight"][0].fill_(1e5))
    source = checkpoint.find(str(saved))
    assert checkpoint.load(source, "bfloat16")
    with pytest.raises(InputError, match=r"layers.1.mixer.in_proj.weight has values .* not finite: try --dtype float32"):
        checkpoint.load(source, "float16")


@pytest.mark.parametrize(("name", "value"), [("ALL_PROXY", "socks://127.0.0.1:9"), ("HTTPS_PROXY", "http://proxy:port")])
def test_proxies_that_make_no_sense_are_one_line(monkeypatch, name, value):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv(name, value)
    assert "proxies" in complaint("acme/none")
