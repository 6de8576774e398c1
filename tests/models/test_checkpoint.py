"""Reading checkpoints in both layouts, whole and in shards, and what is said of broken ones."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsessm.errors import InputError
from sparsessm.models import checkpoint, tokenizing
from sparsessm.models.tokenizing import load_tokenizer

VOCAB = 61  # of the state-spaces config, padded to 64 in the weights


def same_logits(folder: Path, stock, windows, **load) -> None:
    source = checkpoint.find(str(folder))
    model = checkpoint.load(source, **load)
    assert torch.equal(model(windows).logits, stock(windows).logits)


def renamed(stock) -> dict[str, torch.Tensor]:
    """The tensors under their names in the state-spaces layout, the tied head included."""
    state = {key.replace("backbone.embeddings.", "backbone.embedding."): t for key, t in stock.state_dict().items()}
    return {key: tensor.clone() for key, tensor in state.items()}


def write_state_spaces(folder: Path, stock, *, safetensors: bool = False, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        "d_model": 16, "n_layer": 2, "vocab_size": VOCAB, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8, "ssm_cfg": {"d_state": 6, "dt_rank": 3}, **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes))
    if safetensors:
        save_file(renamed(stock), folder / "model.safetensors")
    else:
        torch.save(renamed(stock), folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def saved(tmp_path, tiny_model) -> Path:
    tiny_model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# --- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_safetensors(tmp_path, tiny_model, tiny_windows, tied):
    stock = tiny_model(tie_word_embeddings=tied)
    stock.save_pretrained(tmp_path / "saved")
    same_logits(tmp_path / "saved", stock, tiny_windows())


@pytest.mark.parametrize(
    "sizes", [{"state_size": 1, "conv_kernel": 2, "use_bias": True}, {"state_size": 12, "use_conv_bias": False}], ids=str
)
def test_odd_sizes(tmp_path, tiny_model, tiny_windows, sizes):
    stock = tiny_model(**sizes)
    stock.save_pretrained(tmp_path / "saved")
    same_logits(tmp_path / "saved", stock, tiny_windows())


def test_sharded_safetensors(tmp_path, tiny_model, tiny_windows):
    stock = tiny_model()
    stock.save_pretrained(tmp_path / "saved", max_shard_size="12kB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    same_logits(tmp_path / "saved", stock, tiny_windows())


def test_pytorch_bin(saved, tiny_model, tiny_windows):
    torch.save(tiny_model().state_dict(), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    same_logits(saved, tiny_model(), tiny_windows())


def test_pytorch_bin_of_before_the_zip_format(saved, tiny_model, tiny_windows):
    torch.save(tiny_model().state_dict(), saved / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (saved / "model.safetensors").unlink()
    same_logits(saved, tiny_model(), tiny_windows())


def test_safetensors_come_before_pytorch_bin(saved, tiny_model, tiny_windows):
    torch.save(tiny_model(seed=1).state_dict(), saved / "pytorch_model.bin")
    same_logits(saved, tiny_model(seed=0), tiny_windows())


def test_sharded_pytorch_bin(saved, tiny_model, tiny_windows):
    state = tiny_model().state_dict()
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, keys in shards.items():
        torch.save({key: state[key] for key in keys}, saved / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (saved / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (saved / "model.safetensors").unlink()
    same_logits(saved, tiny_model(), tiny_windows())


@pytest.mark.parametrize("safetensors", [False, True])
def test_state_spaces(tmp_path, tiny_model, tiny_windows, safetensors):
    folder = write_state_spaces(tmp_path / "original", tiny_model(), safetensors=safetensors)
    source = checkpoint.find(str(folder))
    assert source.layout == "state-spaces" and source.config.vocab_size == 64
    same_logits(folder, tiny_model(), tiny_windows())


def test_sharded_state_spaces(tmp_path, tiny_model, tiny_windows):
    folder = write_state_spaces(tmp_path / "original", tiny_model())
    state = renamed(tiny_model())
    (folder / "pytorch_model.bin").unlink()
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    where = {key: files[i % 2] for i, key in enumerate(state)}
    for file in files:
        torch.save({key: tensor for key, tensor in state.items() if where[key] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    same_logits(folder, tiny_model(), tiny_windows())


def test_state_spaces_defaults(tmp_path, tiny_model, tiny_windows):
    """What the published checkpoints leave out: d_state 16, d_conv 4, expand 2, dt_rank ceil(d_model / 16)."""
    stock = tiny_model(hidden_size=24, state_size=16, conv_kernel=4, time_step_rank=2)
    folder = write_state_spaces(tmp_path / "original", stock, d_model=24, ssm_cfg={})
    same_logits(folder, stock, tiny_windows())


def test_state_spaces_options(tmp_path, tiny_model, tiny_windows):
    stock = tiny_model(state_size=5, conv_kernel=2, use_bias=True, use_conv_bias=False, expand=3, residual_in_fp32=False)
    ssm = {"d_state": 5, "d_conv": 2, "expand": 3, "dt_rank": 3, "bias": True, "conv_bias": False}
    folder = write_state_spaces(tmp_path / "original", stock, ssm_cfg=ssm, residual_in_fp32=False)
    source = checkpoint.find(str(folder))
    assert source.config.residual_in_fp32 is False
    same_logits(folder, stock, tiny_windows())


def test_state_spaces_with_an_untied_head(tmp_path, tiny_model, tiny_windows):
    stock = tiny_model(tie_word_embeddings=False)
    folder = write_state_spaces(tmp_path / "original", stock, tie_embeddings=False)
    same_logits(folder, stock, tiny_windows())


def test_the_demo_is_a_name(tiny_windows):
    source = checkpoint.find("demo")
    assert source.layout == "hf" and checkpoint.load(source).config.num_hidden_layers == 6
    assert load_tokenizer(source)("A window of time.")["input_ids"]


# --- dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_A_log_stays_float32_with_values_that_the_dtype_can_hold(saved, tiny_model, dtype, expected):
    stock, model = tiny_model(), checkpoint.load(checkpoint.find(str(saved)), dtype)
    for name, parameter in model.named_parameters():
        original = stock.state_dict()[name]
        if name.endswith(".A_log"):
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, original.to(expected).float())
        else:
            assert parameter.dtype == expected
            assert torch.equal(parameter, original.to(expected))
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_auto_is_the_dtype_of_the_checkpoint(tmp_path, tiny_model):
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        tiny_model(dtype=dtype).save_pretrained(folder)
        model = checkpoint.load(checkpoint.find(str(folder)))
        assert model.backbone.embeddings.weight.dtype == dtype
        assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32


def test_auto_of_the_state_spaces_layout_is_the_dtype_of_its_tensors(tmp_path, tiny_model):
    folder = write_state_spaces(tmp_path / "original", tiny_model(dtype=torch.bfloat16))
    assert checkpoint.load(checkpoint.find(str(folder))).backbone.embeddings.weight.dtype == torch.bfloat16


def test_float32_of_a_bfloat16_checkpoint(tmp_path, tiny_model):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    model = checkpoint.load(checkpoint.find(str(tmp_path / "saved")), "float32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# --- what is wrong with it -----------------------------------------------------------------------------------------


def complaint(name: Path | str) -> str:
    """The one line that a checkpoint is refused with, found out before or while its tensors are read."""
    with pytest.raises(InputError) as caught:
        checkpoint.load(checkpoint.find(str(name)))
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def rewrite_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def rewrite_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


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


# --- what stock would load, and what is refused --------------------------------------------------------------------


def stock_logits(folder: Path, windows) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(windows).logits


def as_stock(folder: Path, windows) -> None:
    model = checkpoint.load(checkpoint.find(str(folder)))
    assert torch.equal(model(windows).logits, stock_logits(folder, windows))


def test_a_head_beside_a_config_that_ties_it(saved, tiny_windows):
    head = 0.1 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    rewrite_tensors(saved, lambda tensors: tensors.update({"lm_head.weight": head}))
    as_stock(saved, tiny_windows())
    model = checkpoint.load(checkpoint.find(str(saved)))
    assert torch.equal(model.lm_head.weight, head) and model.config.tie_word_embeddings is False


def test_only_the_head_of_a_tied_model(saved, tiny_windows):
    rewrite_tensors(saved, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("backbone.embeddings.weight")}))
    as_stock(saved, tiny_windows())


def test_an_index_and_shards_of_an_earlier_save_beside_the_weights(saved, tiny_model, tiny_windows):
    shard = "model-00001-of-00001.safetensors"
    save_file(tiny_model(seed=3).state_dict() | {"lm_head.weight": torch.zeros(1)}, saved / shard)
    names = dict.fromkeys(load_file(saved / "model.safetensors"), shard)
    (saved / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    as_stock(saved, tiny_windows())
    assert [file.name for file in checkpoint.find(str(saved)).files] == ["model.safetensors"]


def test_weights_without_the_prefix_of_their_model(saved, tiny_windows):
    """As a MambaModel saves itself."""
    tensors = load_file(saved / "model.safetensors")
    save_file({name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}, saved / "model.safetensors")
    as_stock(saved, tiny_windows())


def test_a_config_key_that_rescales_weights_when_they_are_loaded(saved, tiny_model, tiny_windows):
    rewrite_config(saved, rescale_prenorm_residual=True)
    as_stock(saved, tiny_windows())
    name = "backbone.layers.1.mixer.out_proj.weight"
    loaded = checkpoint.load(checkpoint.find(str(saved))).state_dict()[name]
    torch.testing.assert_close(loaded, tiny_model().state_dict()[name] / 2**0.5)


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


def test_a_checkpoint_that_was_stepping_aside_when_its_run_was_killed_is_loaded(saved, tiny_model, tiny_windows):
    (saved / ".sparsessm-moving").mkdir()
    (saved / "model.safetensors").rename(saved / ".sparsessm-moving" / "model.safetensors")
    same_logits(saved, tiny_model(), tiny_windows())


def test_the_fingerprint_sees_one_changed_bit(saved):
    source = checkpoint.find(str(saved))
    one, other = checkpoint.load(source), checkpoint.load(source)
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(other)
    other.backbone.layers[1].mixer.D.view(torch.int32)[0] ^= 1
    assert checkpoint.fingerprint(one) != checkpoint.fingerprint(other)
