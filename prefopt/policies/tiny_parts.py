"""What tiny-diffusion and tiny-flow share: tokenizer, text encoder and VAE of the tiny_pictures world, and how such things are made once.

`ensure_parts` makes a folder with `tokenizer`, `text_encoder`, `vae` and the latents of the pretraining pictures, of which the pipelines of
`tiny_diffusion` are made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.data import tiny_pictures
from prefopt.paths import cache_dir
from prefopt.policies import tiny_lm

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL
    from torch import Tensor
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

# Counts of steps, not of seconds: otherwise the cached weights would depend on how busy the machine was.
PICTURES = {"count": 8192, "seed": 0}
TOKENS = 12  # of a caption with its start and end; the world's have 8
TEXT_ENCODER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 64}
TEXT_TRAINING = {"steps": 60, "lr": 3e-3, "warmup_steps": 10}
VAE = {"block_out_channels": (16, 32), "latent_channels": 3, "layers_per_block": 1, "norm_num_groups": 4}
VAE_TRAINING = {"steps": 500, "batch_size": 8, "lr": 3e-3, "muon_lr": 1.5e-2, "warmup_steps": 20, "kl": 1e-3, "l1": 0.2}


def parts_recipe() -> dict[str, object]:
    """All that decides tokenizer, text encoder, VAE and latents, JSON-serialisable."""
    drawn = hashlib.sha256(b"".join(pixels.tobytes() for _, pixels in tiny_pictures.pretraining_pictures(8, PICTURES["seed"])))
    return {
        "pictures": PICTURES | {"first": drawn.hexdigest(), "captions": tiny_pictures.captions("train")},
        "tokens": TOKENS,
        "text_encoder": TEXT_ENCODER | TEXT_TRAINING,
        "vae": VAE | VAE_TRAINING,
        "torch": {"seed": tiny_lm.TRAINING["seed"], "threads": tiny_lm.TRAINING["threads"]},
    }


def cache_path(name: str, recipe: dict[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return cache_dir() / f"{name}-{digest[:12]}"


def ensure_parts(progress: bool = True) -> Path:
    """The folder of the shared parts; made if it is not there."""
    return made(cache_path("tiny-pictures-parts", parts_recipe()), "text encoder and VAE", _make, progress)


def made(path: Path, what: str, make: Callable[[Path, bool], None], progress: bool) -> Path:
    """`path`, filled by `make` where it is not there: into a sibling folder that is renamed, so that it is either absent or complete."""
    if path.is_dir():
        return path
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(progress, f"{path.name}: waiting for another process that is making {path}")
        lock.acquire()
    try:
        if path.is_dir():
            return path
        _say(progress, f"{path.name}: pre-training {what} once into {path}")
        temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent))
        try:
            with tiny_lm._own_torch_state(), _quiet():
                make(temporary, progress)
            _open_to_others(temporary)
            try:
                temporary.rename(path)
            except OSError:
                # Not every network file system keeps locks: another maker's equal result may be there by now.
                if not path.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    finally:
        lock.release()
    return path


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)


def _open_to_others(folder: Path) -> None:
    """The usual rights: mkdtemp and safetensors make private files, which a shared cache cannot use."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars of transformers and diffusers for the few files that are loaded and saved."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [log for log in (of_diffusers, of_transformers) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def train(name: str, model: torch.nn.Module, settings: dict, loss: Callable[[int], Tensor], progress: bool) -> float:
    """Minimises `loss(step)`: a linear warm-up, a cosine down to nothing. Returns the mean loss of the last 20 steps."""
    import torch
    from tqdm import tqdm

    steps, warmup = settings["steps"], settings["warmup_steps"]
    optimizers = _optimizers(model, settings)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    losses = []
    often = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants a line now and then, not a bar
    bar = tqdm(range(steps), name, file=sys.stderr, disable=not progress, mininterval=often)
    for step in bar:
        for group, peak in groups:
            group["lr"] = peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        model.zero_grad()
        value = loss(step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(value.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    model.eval().requires_grad_(False)
    return sum(losses[-20:]) / len(losses[-20:])


def _optimizers(model: torch.nn.Module, settings: dict) -> list[torch.optim.Optimizer]:
    """AdamW for all weights; settings with a `muon_lr` have Muon for the blocks' matrices and kernels, without those of adaLN."""
    import torch

    from prefopt.policies.muon import Muon

    weights = dict(model.named_parameters())
    inner = [name for name, w in weights.items() if re.search(r"(^|_)blocks?\.", name) and w.ndim > 1 and "norm" not in name]
    matrices = [weights.pop(name) for name in inner if "muon_lr" in settings]
    adamw = torch.optim.AdamW(weights.values(), lr=settings["lr"], betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return [adamw, Muon(matrices, settings["muon_lr"])] if matrices else [adamw]


def batches(count: int, size: int, steps: int) -> Iterator[Tensor]:
    """Row numbers [size] for each step: passes through `count` shuffled rows."""
    import torch

    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count)])
        rows, order = order[:size], order[size:]
        yield rows


def start_straight(model: torch.nn.Module) -> None:
    """Blocks that add nothing yet, of U-Nets (as in arXiv 2006.11239's code) and of transformers (adaLN-Zero, arXiv 2212.09748), and there
    an output of 0: these networks learn faster so."""
    import torch

    for name, module in model.named_modules():
        if module.__class__.__name__ == "ResnetBlock2D":
            torch.nn.init.zeros_(module.conv2.weight)
        elif name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges that make each word of the world one token; other words are spelled in letters."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in tiny_pictures.vocabulary():
        # Each merge stands behind those of the words before it, whose spelling it therefore leaves as it is.
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = _merged(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            vocabulary.append(pieces[0] + pieces[1])
            pieces = _merged(pieces, merges[-1])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(vocabulary)}, merges=merges, model_max_length=TOKENS)


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with every neighbouring `pair` made one."""
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def _make(folder: Path, progress: bool) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder, text_loss = _text_encoder(tokenizer, progress)
    text_encoder.save_pretrained(folder / "text_encoder")
    known = {text: number for number, text in enumerate(tiny_pictures.captions("train"))}
    drawn = list(tiny_pictures.pretraining_pictures(PICTURES["count"], PICTURES["seed"]))
    pixels = torch.from_numpy(np.stack([picture for _, picture in drawn])).permute(0, 3, 1, 2)
    vae, vae_loss = _vae(pixels, progress)
    mean, std = _latents(vae, pixels)
    vae.save_pretrained(folder / "vae")
    numbers = torch.tensor([known[text] for text, _ in drawn])
    save_file({"mean": mean.half().contiguous(), "std": std.half().contiguous(), "caption": numbers}, folder / "latents.safetensors")
    record = {"recipe": parts_recipe(), "text_loss": round(text_loss, 4), "vae_loss": round(vae_loss, 5)}
    (folder / "tiny_diffusion.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def tokens_of(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def _text_encoder(tokenizer: CLIPTokenizer, progress: bool) -> tuple[CLIPTextModelWithProjection, float]:
    """A text encoder whose pooled embedding tells count, colour, shape and place of a train caption, and its loss in nats for the four."""
    import torch
    from torch.nn import functional as F
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=TOKENS, **TEXT_ENCODER, **ids)
    ).train()
    texts = tiny_pictures.captions("train")
    asked = [tiny_pictures.asked_by(text) for text in texts]
    values = {name: sorted({getattr(a, name) for a in asked}) for name in ("count", "colour", "shape", "place")}
    targets = {name: torch.tensor([known.index(getattr(a, name)) for a in asked]) for name, known in values.items()}
    heads = torch.nn.ModuleDict({name: torch.nn.Linear(TEXT_ENCODER["projection_dim"], len(known)) for name, known in values.items()})
    tokens = tokens_of(tokenizer, texts)

    def loss(_: int) -> Tensor:
        pooled = model(input_ids=tokens).text_embeds
        return sum(F.cross_entropy(head(pooled), targets[name]) for name, head in heads.items())

    both = torch.nn.ModuleList([model, heads])
    return model, train("text encoder", both, TEXT_TRAINING, loss, progress)


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _vae(pixels: Tensor, progress: bool) -> tuple[AutoencoderKL, float]:
    """A VAE of these pictures [N, 3, H, W] uint8, its latents of the same scale in every channel, and its loss."""
    import torch
    from diffusers import AutoencoderKL

    levels = len(VAE["block_out_channels"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=tiny_pictures.SIZE,
        mid_block_add_attention=False,
        shift_factor=0.0,
        **VAE,
    ).train()
    vae.to(memory_format=torch.channels_last)
    start_straight(vae)
    coming = batches(len(pixels), VAE_TRAINING["batch_size"], VAE_TRAINING["steps"])

    def loss(_: int) -> Tensor:
        x = _scaled(pixels[next(coming)]).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        off = vae.decode(posterior.sample()).sample - x
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return off.square().mean() + VAE_TRAINING["l1"] * off.abs().mean() + VAE_TRAINING["kl"] * divergence

    final = train("VAE", vae, VAE_TRAINING, loss, progress)
    _even_out(vae, pixels[:1024])
    return vae, final


def _even_out(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Gives every latent channel mean 0 and one standard deviation, s, by rewriting the 1x1 convolutions around the latents; 1/s becomes
    the scaling factor. Decoded pictures stay as they are."""
    import torch

    with torch.no_grad():
        latents = vae.encode(_scaled(pixels)).latent_dist.mean
        centre, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        common = spread.square().mean().sqrt()
        factor, channels = common / spread, len(centre)
        mean, log_variance = vae.quant_conv.weight[:channels], vae.quant_conv.bias[channels:]
        mean.mul_(factor[:, None, None, None])
        vae.quant_conv.bias[:channels].sub_(centre).mul_(factor)
        log_variance.add_(2 * factor.log())
        vae.post_quant_conv.bias.add_(vae.post_quant_conv.weight[:, :, 0, 0] @ centre)
        vae.post_quant_conv.weight.div_(factor[:, None, None])
    vae.register_to_config(scaling_factor=round(1 / float(common), 4))


def _latents(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [N, C, 16, 16] of the latents, scaled as the denoiser wants them."""
    import torch

    with torch.no_grad():
        posteriors = [vae.encode(_scaled(some)).latent_dist for some in pixels.split(256)]
    factor = vae.config.scaling_factor
    return torch.cat([p.mean for p in posteriors]) * factor, torch.cat([p.std for p in posteriors]) * factor
