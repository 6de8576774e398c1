"""Train a small Mamba language model from scratch on a folder of text files, on a CPU or a GPU.

The defaults give a model of data/mamba-demo's shape (d_model 192, 6 layers, 2.3M parameters), and at 2600 steps about
as many tokens as that one saw (10.6 million):

    python scripts/train_demo.py TEXT_FOLDER OUTPUT

A byte-level BPE tokenizer is trained on the text first. The state of the training is kept in OUTPUT.training.pt: run
the same command again after an interruption, and it ends with the weights of an undisturbed run (to the bit on a CPU; a
GPU adds up gradients in no fixed order). OUTPUT appears when all is done: an ordinary Hugging Face checkpoint with its
tokenizer.

The forward pass is written out here because stock transformers, without CUDA kernels, differentiates through a Python
loop that indexes (B,D,L,N) tensors, and the backward of every index is as large as what it indexes. SelectiveScan loops
as well, but has its own backward. tests/test_train_demo.py compares both with stock transformers. References: Gu
and Dao 2023 (section 3.2; appendix E.2 for the optimiser); data order and training state follow nanoGPT's train.py.

Letters: B batch, L seqlen, D d_inner, N d_state, M d_model, R dt_rank, V vocabulary.
"""

import argparse
import contextlib
import functools
import hashlib
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, only scripts/ would be on the path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from sparsessm.errors import InputError

END_OF_TEXT = "<|endoftext|>"
WARMUP_SHARE = 0.02  # of the steps
WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
GRADIENT_NORM = 1.0


def train(
    *,
    text_folder: str | Path,
    output: str | Path,
    patterns: tuple[str, ...] = ("*.txt", "*.md"),
    d_model: int = 192,
    layers: int = 6,
    d_state: int = 16,
    vocab: int = 4096,
    seqlen: int = 512,
    batch: int = 8,
    steps: int = 2600,
    lr: float = 3e-3,
    seed: int = 0,
    validation_share: float = 0.02,
    save_every: int = 100,
    device: str = "cpu",
) -> float:
    """Train, write the checkpoint folder `output`, and return the perplexity on the windows held out.

    text_folder: searched recursively for files that match `patterns`. validation_share: of all windows, held out evenly
    over the text. save_every: steps between two writes of the training state `output`.training.pt, from which the next
    call continues. Raises InputError if there is no text or too little, if a number is out of range, if `output` exists,
    or if the training state is of another text or of other settings.
    """
    numbers = dict(
        d_model=d_model, layers=layers, d_state=d_state, vocab=vocab, seqlen=seqlen, batch=batch, steps=steps, lr=lr,
        save_every=save_every,
    )  # fmt: skip
    for name, number in numbers.items():
        if number <= 0:
            raise InputError(f"--{name} must be positive, not {number}")
    if not 0 < validation_share <= 0.5:
        raise InputError(f"--validation_share must be above 0 and at most 0.5, not {validation_share}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("this machine or this torch has no CUDA: leave --device out")
    output = Path(output)
    if output.exists():
        raise InputError(f"{output} exists: give another folder, or delete it")
    documents = read_documents(Path(text_folder), patterns)

    output.parent.mkdir(parents=True, exist_ok=True)
    state_file = output.with_name(f"{output.name}.training.pt")
    state = torch.load(state_file, map_location="cpu", weights_only=True) if state_file.exists() else None
    tokenizer = Tokenizer.from_str(state["tokenizer"]) if state else train_tokenizer(documents, vocab)
    ids = tokenise(tokenizer, documents)  # (T,)
    training, validation = split_windows(ids, seqlen, validation_share)  # (n, seqlen), (m, seqlen)

    torch.manual_seed(seed)
    config = MambaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=d_model,
        num_hidden_layers=layers,
        state_size=d_state,
        bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        eos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )
    model = MambaForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=lr, betas=BETAS)
    # What the result depends on: a state of other settings cannot be resumed. (save_every is not among them.)
    settings = {
        **{name: number for name, number in numbers.items() if name != "save_every"},
        "seed": seed,
        "validation_share": validation_share,
        "text": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
    }
    first = 0
    if state:
        changed = [name for name, value in settings.items() if state["settings"][name] != value]
        if changed:
            raise InputError(f"{state_file} was started with another {', '.join(changed)}: give the same, or delete it")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        first = state["step"]

    progress = tqdm(range(first, steps), initial=first, total=steps, disable=None, unit="step")  # None: terminals only
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        windows = training[rows_of_step(len(training), batch, seed, step)].to(device)  # (B, L)
        loss = mean_loss(model, windows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1, rng=torch.get_rng_state(),
                tokenizer=tokenizer.to_str(), settings=settings,
            )  # fmt: skip
            with replacing(state_file) as temporary:
                torch.save(state, temporary)

    perplexity = validation_perplexity(model, validation, batch)
    write_checkpoint(output, model, tokenizer)
    state_file.unlink()
    return perplexity


# ---- text ------------------------------------------------------------------------------------------------------------


def read_documents(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """The texts of all matching files under `folder`, sorted by path; bytes that are not UTF-8 are replaced."""
    paths = sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()})
    if not paths:
        raise InputError(f"no {' or '.join(patterns)} files in {folder}: give a folder that holds text")
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def train_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with `vocab` tokens (at least 257: the bytes), END_OF_TEXT the first of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes: no text is ever unknown
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokenise(tokenizer: Tokenizer, documents: list[str]) -> torch.LongTensor:
    """All documents as one stream (T,), END_OF_TEXT after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return torch.tensor([token for encoded in tokenizer.encode_batch(documents) for token in (*encoded.ids, end)])


def split_windows(ids: torch.LongTensor, seqlen: int, share: float) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Cut (T,) into windows and hold out every k-th, k = 1 / share: (n, seqlen) to train on, (m, seqlen) held out."""
    count, every = len(ids) // seqlen, max(2, round(1 / share))
    if count < every:
        raise InputError(
            f"the text has {len(ids)} tokens, {count} windows of {seqlen}, but {every} are needed to hold one out: "
            "give more text, a smaller --seqlen or a larger --validation_share"
        )
    windows = ids[: count * seqlen].view(count, seqlen)
    held_out = torch.arange(count) % every == every - 1
    return windows[~held_out], windows[held_out]


@functools.lru_cache(maxsize=2)  # a step may reach from one epoch into the next
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def rows_of_step(count: int, batch: int, seed: int, step: int) -> list[int]:
    """The windows step `step` trains on, of `count`. Every epoch is a shuffle of all windows.

    A pure function of its arguments, not of a generator's state: a resumed run sees what it would have seen.
    """
    places = (divmod(position, count) for position in range(step * batch, (step + 1) * batch))
    return [epoch_order(count, seed, epoch)[place] for epoch, place in places]


# ---- the model -------------------------------------------------------------------------------------------------------


class SelectiveScan(torch.autograd.Function):
    """y_t = h_t c_t, h_t = a_t h_{t-1} + (dt_t u_t) b_t, a_t = exp(dt_t A), h_{-1} = 0 (section 3.2 of the paper).

    dt and u are (L, B, D), A is (D, N), b and c are (L, B, N); y is (L, B, D). Time comes first so that what a step
    touches lies together: (B, D, N) numbers, which stay in a CPU's cache. Only the states are kept for the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, A: torch.Tensor, dt: torch.Tensor, u: torch.Tensor, b: torch.Tensor, c: torch.Tensor
    ) -> torch.Tensor:
        dt, u, b, c = (each.contiguous() for each in (dt, u, b, c))
        x = dt * u  # (L, B, D)
        states = x.new_zeros(len(x) + 1, *x.shape[1:], A.shape[1])  # (L + 1, B, D, N), h_{t-1} at t
        a = torch.empty_like(states[0])
        y = torch.empty_like(x)
        for t in range(len(x)):
            torch.mul(dt[t, :, :, None], A, out=a).exp_()
            torch.mul(a, states[t], out=states[t + 1]).addcmul_(x[t, :, :, None], b[t, :, None, :])
            torch.bmm(states[t + 1], c[t, :, :, None], out=y[t, :, :, None])
        ctx.save_for_backward(dt, u, A, b, c, states)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """With s_t the gradient of the loss by h_t: s_t = dy_t c_t + a_{t+1} s_{t+1}, and q_t = s_t a_t h_{t-1} that by
        the exponent dt_t A."""
        dt, u, A, b, c, states = ctx.saved_tensors
        dy, x = dy.contiguous(), dt * u
        dx, d_exponent_dt = torch.empty_like(x), torch.empty_like(x)  # (L, B, D)
        db, dc = torch.empty_like(b), torch.empty_like(c)  # (L, B, N)
        s, dA = torch.zeros_like(states[0]), torch.zeros_like(states[0])  # (B, D, N)
        a, q = torch.empty_like(s), torch.empty_like(s)
        for t in range(len(x) - 1, -1, -1):
            s.addcmul_(dy[t, :, :, None], c[t, :, None, :])
            torch.bmm(dy[t, :, None, :], states[t + 1], out=dc[t, :, None, :])
            torch.bmm(x[t, :, None, :], s, out=db[t, :, None, :])
            torch.bmm(s, b[t, :, :, None], out=dx[t, :, :, None])
            torch.mul(dt[t, :, :, None], A, out=a).exp_()
            s.mul_(a)  # from here on a_t s_t: what reaches h_{t-1}
            torch.mul(s, states[t], out=q)
            dA.addcmul_(q, dt[t, :, :, None])
            torch.sum(q.mul_(A), dim=-1, out=d_exponent_dt[t])
        return dA.sum(0), dx * u + d_exponent_dt, dx * dt, db, dc


def mixer_forward(mixer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One Mamba mixer with the parameters of transformers' MambaMixer: (B, L, M) -> (B, L, M)."""
    length, d_inner, d_state = x.shape[1], mixer.intermediate_size, mixer.ssm_state_size
    u, gate = mixer.in_proj(x).split(d_inner, dim=-1)  # (B, L, D) each
    # The causal convolution as a sum of shifted copies: torch's own takes longer on a CPU than the rest of the block.
    weights = mixer.conv1d.weight[:, 0].unbind(-1)  # K of (D,)
    padded = F.pad(u, (0, 0, len(weights) - 1, 0))  # (B, K - 1 + L, D)
    u = F.silu(sum(weight * padded[:, k : k + length] for k, weight in enumerate(weights)) + mixer.conv1d.bias)
    dt, b, c = mixer.x_proj(u).split([mixer.time_step_rank, d_state, d_state], dim=-1)  # (B, L, R), (B, L, N) twice
    dt = F.softplus(mixer.dt_proj(dt))  # (B, L, D)
    time_first = (each.transpose(0, 1) for each in (dt, u, b, c))  # (L, B, D) twice, (L, B, N) twice
    y = SelectiveScan.apply(-torch.exp(mixer.A_log), *time_first).transpose(0, 1)  # (B, L, D)
    return mixer.out_proj((y + mixer.D * u) * F.silu(gate))


def mean_loss(model: MambaForCausalLM, windows: torch.LongTensor) -> torch.Tensor:
    """Mean negative log likelihood in nats of each window's tokens but the first: (B, L) -> ()."""
    x = model.backbone.embeddings(windows)  # (B, L, M)
    for layer in model.backbone.layers:
        x = x + mixer_forward(layer.mixer, layer.norm(x))
    logits = model.lm_head(model.backbone.norm_f(x[:, :-1]))  # (B, L - 1, V)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validation_perplexity(model: MambaForCausalLM, windows: torch.LongTensor, batch: int) -> float:
    device = model.device
    losses = [mean_loss(model, part.to(device)).item() * len(part) for part in windows.split(batch)]
    return math.exp(sum(losses) / len(windows))


# ---- optimisation ----------------------------------------------------------------------------------------------------


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Weight decay on matrices; none on biases, norms, D and conv1d, nor on A_log, which decay would pull to A = -1."""
    decayed = {
        name for name, parameter in model.named_parameters() if parameter.ndim == 2 and not name.endswith("A_log")
    }
    return [
        {"params": [p for name, p in model.named_parameters() if name in decayed], "weight_decay": WEIGHT_DECAY},
        {"params": [p for name, p in model.named_parameters() if name not in decayed], "weight_decay": 0.0},
    ]


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at `step`: linear warmup, then a cosine down to zero at `steps`."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---- files and the command line --------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces it at the end of the block: no file is ever half written."""
    temporary = path.with_name(f".{path.name}.partial")
    yield temporary
    os.replace(temporary, path)


def write_checkpoint(output: Path, model: MambaForCausalLM, tokenizer: Tokenizer) -> None:
    """Model and tokenizer as AutoModelForCausalLM and AutoTokenizer open them."""
    with replacing(output) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run killed right here
        model.save_pretrained(temporary)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
        ).save_pretrained(temporary)


def main(arguments: list[str] | None = None) -> int:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("text_folder", help="folder searched recursively for text files")
    parser.add_argument("output", help="folder to write the checkpoint to; must not exist")
    parser.add_argument("--patterns", nargs="+", help="names of the files to read")
    parser.add_argument("--d_model", type=int, help="width of the model")
    parser.add_argument("--layers", type=int, help="number of blocks")
    parser.add_argument("--d_state", type=int, help="states a channel")
    parser.add_argument("--vocab", type=int, help="tokens of the tokenizer, at least 257")
    parser.add_argument("--seqlen", type=int, help="tokens of a window")
    parser.add_argument("--batch", type=int, help="windows a step")
    parser.add_argument("--steps", type=int, help="steps of the optimiser")
    parser.add_argument("--lr", type=float, help="highest learning rate")
    parser.add_argument("--seed", type=int, help="of initial weights and data order")
    parser.add_argument("--validation_share", type=float, help="share of the windows held out")
    parser.add_argument("--save_every", type=int, help="steps between two writes of the training state")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...")
    parser.set_defaults(**train.__kwdefaults__)  # each default is written once, in train's signature
    options = vars(parser.parse_args(arguments))
    options["patterns"] = tuple(options["patterns"])
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers has one for writing the checkpoint; ours sees for itself
    try:
        perplexity = train(**options)
    except InputError as error:
        print(f"train_demo.py: {error}", file=sys.stderr)
        return 2
    print(f"{options['output']}: validation perplexity {perplexity:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
