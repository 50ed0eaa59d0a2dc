"""What the benchmark trains: pairs with the lengths of known datasets, a tokenizer that gives texts exactly those lengths, random weights.

Nothing is downloaded. Speed and memory depend on shapes and lengths; what the words and weights are does not matter to them.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

VOCABULARY = 49_152  # SmolLM2's
SPECIAL = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class Mix:
    """Mean lengths in tokens, and the spread of their logarithms. A length above `longest` (prompt, reply) is cut to it, so that no pair
    passes the 1,024 tokens at which TRL cuts by default; the means hold after that.
    """

    prompt: int
    chosen: int
    rejected: int
    sigma_prompt: float
    sigma_reply: float
    longest: tuple[int, int]
    why: str


# The spreads are those whose log-normal has the coefficient of variation (standard deviation over mean) measured in public data, with
# SmolLM2's tokenizer: hh-rlhf harmless-base, test split, 1,800 rows: 0.92 for prompts, 0.95 for chosen and 0.98 for rejected replies
# (means 126, 40 and 50 tokens), sigma = sqrt(log(1 + cv^2)) = 0.78, 0.80 and 0.82. UltraFeedback was not at hand; AlpacaEval's 605
# instructions and the best and worst of six models' replies have 1.32, 0.44 and 0.89: sigma 1.01, 0.42 and 0.76.
MIXES = {
    "hh": Mix(300, 70, 70, 0.8, 0.8, (704, 320), "multi-turn dialogues with short replies, as in hh-rlhf"),
    "ultrafeedback": Mix(180, 300, 290, 1.0, 0.6, (448, 576), "instructions with long replies, as in UltraFeedback"),
    "long": Mix(1024, 512, 512, 0.8, 0.6, (4096, 2048), "long prompts"),
}


def lengths(rng: random.Random, count: int, mean: float, sigma: float, longest: int) -> list[int]:
    """`count` token counts from a log-normal, one from each of `count` slices of equal probability, in random order and with exactly the
    mean (to rounding): small batches vary as the distribution does, and none is long or short by chance.
    """
    quantiles = [(i + min(max(rng.random(), 0.01), 0.99)) / count for i in range(count)]
    rng.shuffle(quantiles)
    drawn = [math.exp(sigma * NormalDist().inv_cdf(q)) for q in quantiles]
    scale = mean / fmean(drawn)
    for _ in range(50):  # cutting the longest takes from the mean; the others make up for it
        scale *= mean / fmean(min(longest, scale * x) for x in drawn)
    return [max(2, round(min(longest, scale * x))) for x in drawn]


def pairs(mix: Mix, steps: int, batch: int, seed: int) -> list[dict[str, str]]:
    """Rows of text for so many steps of `batch` pairs. Each step has the mix's mean lengths. A reply's last token is its end."""
    rng = random.Random(f"pairs {seed}")

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(VOCABULARY - len(SPECIAL))}" for _ in range(count))

    rows = []
    for _ in range(steps):
        drawn = zip(
            lengths(rng, batch, mix.prompt, mix.sigma_prompt, mix.longest[0]),
            lengths(rng, batch, mix.chosen, mix.sigma_reply, mix.longest[1]),
            lengths(rng, batch, mix.rejected, mix.sigma_reply, mix.longest[1]),
            strict=True,
        )
        rows += [{"prompt": words(p), "chosen": " " + words(c - 1), "rejected": " " + words(r - 1)} for p, c, r in drawn]
    return rows


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; `model` is the config of conf/model whose settings it is trained with."""

    model: str
    config: dict[str, Any]
    dtype: str = "float32"


LLAMA3 = {"rope_theta": 5e5, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
SHAPES = {
    "smollm2-135m": Shape("smollm2-135m", {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "vocab_size": VOCABULARY, "tie_word_embeddings": True, "rope_theta": 1e5, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    }),
    "llama-1.2b": Shape("llama3-8b", {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
        "vocab_size": 128_256, "tie_word_embeddings": True, **LLAMA3,
    }),
    "llama3-8b": Shape("llama3-8b", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14_336,
        "vocab_size": 128_256, "tie_word_embeddings": False, **LLAMA3,
    }, "bfloat16"),
    "tiny": Shape("smollm2-135m", {  # to try the benchmark itself
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64,
        "vocab_size": VOCABULARY, "tie_word_embeddings": True, "rope_theta": 1e4, "max_position_embeddings": 8192,
    }),
}  # fmt: skip


def save_model(folder: Path, shape: Shape) -> None:
    """Random weights and the tokenizer, as save_pretrained writes them. Ids beyond the tokenizer's words are never used."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    names = [*SPECIAL, *(f"w{i}" for i in range(VOCABULARY - len(SPECIAL)))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                        clean_up_tokenization_spaces=False)
    torch.manual_seed(0)
    config = LlamaConfig(**shape.config, pad_token_id=0, eos_token_id=1, bos_token_id=None, attention_dropout=0.0)
    config.dtype = shape.dtype
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # drawing 8 billion numbers takes minutes on a CPU
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(folder: Path, name: str, rows: list[dict[str, str]], batch: int) -> dict[str, str]:
    """Two files with the rows, by side: TRL reads its own in order, prefopt shuffles its own into just that order."""
    from prefopt.data.batch import step_rows

    order = [r for step in range(-(-len(rows) // batch)) for r in step_rows(len(rows), batch, step, seed=0)]
    shuffled: list[dict[str, str]] = [{}] * len(rows)
    for place, row in zip(order, rows, strict=True):
        shuffled[place] = row
    paths = {}
    for side, content in (("trl", rows), ("prefopt", shuffled)):
        path = folder / f"{name}-{side}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        paths[side] = str(path)
    return paths
