"""model=tiny-lm: a real transformers causal LM for the tiny_feedback world, made on first use and cached.

About 0.6 M parameters and a word-level fast tokenizer, pre-trained on replies of every quality, so that it
speaks the world's language and has much to gain from preferences. The cache folder is in the usual
`save_pretrained` format and named after a hash of the recipe, so a changed recipe never meets old weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.data import tiny_feedback
from prefopt.paths import cache_dir

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
# A count of steps, not of seconds: otherwise the cached weights would depend on how busy the machine was.
TRAINING = {
    "seed": 0,
    "steps": 600,
    "batch_size": 20,
    "lr": 4e-3,
    "warmup_steps": 40,
    "final_lr": 0.05,
    "betas": (0.9, 0.98),
    "weight_decay": 0.01,
    "clip": 1.0,
    # Other thread counts sum in another order and would give other weights.
    "threads": 2,
}
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role not in ["system", "user", "assistant"] -%}
{{- raise_exception("tiny-lm knows the roles system, user and assistant, not " ~ message.role) -}}
{%- endif -%}
{{- "<|" ~ message.role ~ "|>" -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{%- if message.role == "assistant" -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""
_IGNORED = -100


def _recipe() -> dict[str, object]:
    """All that decides the weights and the tokenizer, JSON-serialisable."""
    return {
        "model": MODEL,
        "training": TRAINING,
        "special": SPECIAL,
        "chat_template": CHAT_TEMPLATE,
        "vocabulary": tiny_feedback.vocabulary(),
        "rows": list(tiny_feedback.pretraining_rows(8, TRAINING["seed"])),
    }


def tiny_lm_path() -> Path:
    """Where this recipe's model lies, or will lie, in the cache."""
    digest = hashlib.sha256(json.dumps(_recipe(), sort_keys=True).encode()).hexdigest()
    return cache_dir() / f"tiny-lm-{digest[:12]}"


def ensure_tiny_lm(progress: bool = True) -> Path:
    """The folder of the pre-trained model and tokenizer, for `from_pretrained`; makes it if it is not there.

    Making it takes a fixed number of steps, about a minute on two cores, and leaves the caller's RNG state,
    thread count and default dtype as they were. `progress` shows a line and a bar on stderr. Of several
    processes that ask at once, one makes it and the others wait.
    """
    path = tiny_lm_path()
    if path.is_dir():
        return path
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say(progress, f"tiny-lm: waiting for another process that is making {path}")
        lock.acquire()
    try:
        if not path.is_dir():
            _make(path, progress)
    finally:
        lock.release()
    return path


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)


def _make(path: Path, progress: bool) -> None:
    """Trains into a sibling folder and renames it, so that `path` is either absent or complete."""
    steps = TRAINING["steps"]
    _say(progress, f"tiny-lm: pre-training it once ({steps} steps, about a minute on two cores) into {path}")
    temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".part", dir=path.parent))
    try:
        tokenizer = build_tokenizer()
        with _own_torch_state():
            model, loss = _pretrain(tokenizer, progress)
            _save_quietly(model, temporary)
        tokenizer.save_pretrained(temporary)
        record = {"recipe": _recipe(), "parameters": model.num_parameters(), "final_loss": round(loss, 4)}
        (temporary / "tiny_lm.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        _open_to_others(temporary)
        try:
            temporary.rename(path)
        except OSError:
            # Not every network file system keeps locks: another maker's equal result may be there by now.
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """The usual rights: mkdtemp and safetensors make private files, which a shared cache cannot use."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)


def _save_quietly(model: LlamaForCausalLM, folder: Path) -> None:
    """`save_pretrained` without transformers' own bar for the one file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level over the world's vocabulary: whitespace divides, punctuation stands alone.

    Encoding adds no special tokens; BOS, roles and EOS come from the chat template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *tiny_feedback.vocabulary()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    # There are no word pieces here: this decoder joins words by spaces and sets punctuation close.
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MODEL["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


@contextlib.contextmanager
def _own_torch_state() -> Iterator[None]:
    """Seeded fp32 CPU torch for the body; RNG, threads, dtype and denormal mode come back after it."""
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    # There is no getter: half the smallest normal float is zero exactly where denormals are flushed.
    flushed = bool((torch.full((1,), torch.finfo(torch.float32).tiny, dtype=torch.float32) * 0.5 == 0).item())
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
    ):
        # torch.manual_seed would also reseed the caller's GPUs.
        torch.default_generator.manual_seed(TRAINING["seed"])
        torch.set_num_threads(TRAINING["threads"])
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.set_flush_denormal(flushed)


def _steps(tokenizer: PreTrainedTokenizerFast) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Per step its short and its long rows; each half as tokens, attention mask and labels, all [B/2, T].

    Labels hold the reply and its EOS. Without the halves, half of all tokens would be padding.
    """
    size = TRAINING["batch_size"]
    rows = tiny_feedback.pretraining_rows(TRAINING["steps"] * size, TRAINING["seed"])
    reply_start = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for _ in range(TRAINING["steps"]):
        chats = [row["prompt"] + row["completion"] for row in islice(rows, size)]
        rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        rendered.sort(key=tiny_feedback.word_count)
        halves = []
        for half in (rendered[: size // 2], rendered[size // 2 :]):
            encoded = tokenizer(half, padding=True, padding_side="right", return_tensors="pt")
            tokens, mask = encoded["input_ids"], encoded["attention_mask"]
            in_reply = (tokens == reply_start).cumsum(1).bool() & (tokens != reply_start) & mask.bool()
            halves.append((tokens, mask, tokens.masked_fill(~in_reply, _IGNORED)))
        yield halves


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The transformers config of the model."""
    from transformers import LlamaConfig

    shape = {key: value for key, value in MODEL.items() if key != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": MODEL["rope_theta"]}
    return LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, rope_parameters=rope, **shape, **_special_ids(tokenizer))


def _pretrain(tokenizer: PreTrainedTokenizerFast, progress: bool) -> tuple[LlamaForCausalLM, float]:
    """The trained model, in eval mode, and the mean loss of its last 20 steps in nats per reply token."""
    import torch
    from torch.nn import functional as F
    from torch.optim.lr_scheduler import LambdaLR
    from tqdm import tqdm
    from transformers import GenerationConfig, LlamaForCausalLM

    model = LlamaForCausalLM(model_config(tokenizer)).train()
    model.generation_config = GenerationConfig(**_special_ids(tokenizer))

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=TRAINING["lr"], betas=TRAINING["betas"], weight_decay=TRAINING["weight_decay"]
    )
    schedule = LambdaLR(optimizer, _lr_factor)
    losses = []
    often = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants a line now and then, not a bar
    bar = tqdm(_steps(tokenizer), "tiny-lm", TRAINING["steps"], file=sys.stderr, disable=not progress, mininterval=often)
    for halves in bar:
        optimizer.zero_grad()
        count = sum(int((labels != _IGNORED).sum()) for _, _, labels in halves)
        losses.append(0.0)
        for tokens, mask, labels in halves:
            logits = (
                model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1].flatten(0, 1)
            )
            summed = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=_IGNORED, reduction="sum")
            loss = summed / count
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING["clip"])
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
    last = losses[-20:]
    return model.eval(), sum(last) / len(last)


def _lr_factor(step: int) -> float:
    """Linear warm-up, then a cosine down to `final_lr` of the peak."""
    warmup, steps, floor = TRAINING["warmup_steps"], TRAINING["steps"], TRAINING["final_lr"]
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
