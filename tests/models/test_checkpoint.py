"""Reading checkpoints in both layouts, whole and in shards: what stock would load is what is loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsessm.models import checkpoint
from sparsessm.models.tokenizing import load_tokenizer
from tests.checkpoints import renamed, rewrite_config, rewrite_tensors, same_logits, write_state_spaces

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
