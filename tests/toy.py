"""Tiny tokenizers, chat templates and language models, made on the spot: no test needs a download."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from prefopt.config.schema import DataConfig, LoraConfig, ModelConfig, TrustConfig
from prefopt.data.batch import MicroBatch, Row, build
from prefopt.data.records import Example, parse_row
from prefopt.data.tokenise import Tokeniser
from prefopt.policies.causal_lm import CausalLM

COLUMNS = vars(DataConfig().columns)
LINES = (
    "Hello there, how are you today? I am well, thank you.",
    "The capital of France is Paris. The capital of Peru is Lima.",
    "Two and two make four; three and three make six.\n\nIs that so?",
    "Human: tell me a story. Assistant: once upon a time there was a fox.",
    "user assistant system model think system prompt helpful",
)
SAVED: dict[tuple, tuple[dict[str, bytes], torch.Tensor]] = {}  # models that were made: their files, and the state of the RNG after
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")

# In the styles of published models; bos_token and eos_token are the tokenizer's own.
TEMPLATES = {
    # Llama 3: the template writes the BOS, a turn ends with <|eot_id|>, which is not the EOS of the base model
    "llama3": "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.first %}{{ bos_token + text }}{% else %}{{ text }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # Qwen 2, SmolLM 2: no BOS, a default system prompt, text after the end of a turn
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "system": "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nhelpful<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Zephyr: plain-text role marks, the tokenizer's EOS ends every turn, and the BOS is added by the tokenizer alone
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # Gemma: BOS in the template, the assistant is called model, no system turn
    "gemma": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    # Qwen 3: an empty thought before the last reply, none before earlier ones
    "thinking": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # R1 distillations: the prompt opens a thought that the full rendering does not have
    "opens_thought": "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    # Mistral v0.3: instructions in brackets, a space before each reply, a system message only where a user's turn comes last
    "mistral": "{{ bos_token }}{% set told = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + (told if loop.last else '') + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
    # Gemma 3: as Gemma 2, and a system message opens the first user's turn
    "gemma3": "{{ bos_token }}{% set told = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in (messages[1:] if told else messages) %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + (told if loop.first else '') }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    # Qwen 3 in full: thoughts leave earlier turns, the last reply gets one (if need be an empty one), and a prompt asks for none on demand
    "qwen3": "{% set asked = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set asked.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' %}"
    "{% if loop.index0 > asked.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ parts[-1].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    # A template and a tokenizer which both insist on a BOS
    "two_bos": "{{ bos_token + bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
}
MARKS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "system": ("<|im_start|>", "<|im_end|>"),
    "zephyr": (),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "thinking": ("<|im_start|>", "<|im_end|>"),
    "opens_thought": ("<|im_start|>", "<|im_end|>"),
    "mistral": ("[INST]", "[/INST]"),
    "gemma3": ("<start_of_turn>", "<end_of_turn>"),
    "qwen3": ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    "two_bos": (),
}
ADDS_BOS = ("llama3", "zephyr", "gemma", "gemma3", "mistral", "opens_thought")  # those whose tokenizers add a BOS to bare text


@cache
def _backend(kind: str, marks: tuple[str, ...]) -> str:
    """A tokenizer as JSON: training one takes longer than most tests."""
    if kind == "word":
        words = sorted({w for line in LINES for w in line.replace(",", " ,").replace(".", " .").replace("?", " ?").split()})
        backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*marks, *words])}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")])
    elif kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(marks), initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(LINES, trainer)
    elif kind == "pieces":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=list(marks), unk_token="<unk>", show_progress=False)
        backend.train_from_iterator(LINES, trainer)
    else:
        raise ValueError(kind)
    backend.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in marks])
    return backend.to_str()


def tokenizer(kind: str = "bytes", template: str | None = None, adds_bos: bool | None = None, **special: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of `kind` word, bytes (byte-level BPE) or pieces (Unigram with a metaspace).

    `template` is a key of TEMPLATES; whether bare text gets a BOS follows its model family unless `adds_bos` is given.
    """
    backend = Tokenizer.from_str(_backend(kind, (*SPECIAL, *MARKS.get(template, ()))))
    if template in ADDS_BOS if adds_bos is None else adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATES.get(template), clean_up_tokenization_spaces=False,
                                   **{k: v for k, v in special.items() if v is not None})


def data_config(**settings: Any) -> DataConfig:
    return DataConfig(**{"name": "toy", "source": "files", **settings})


def tokeniser(
    kind: str = "bytes", template: str | None = None, context: int = 512, chat_template: str | None = None, **data: Any
) -> Tokeniser:
    return Tokeniser(tokenizer(kind, template), data_config(**data), context, chat_template)


def example(**row: Any) -> Example:
    return parse_row(row, COLUMNS, "toy row 1")


def pair(prompt: Any = "How are you?", chosen: Any = "I am well.", rejected: Any = "Two and two make four.", **more: Any) -> Example:
    return example(prompt=prompt, chosen=chosen, rejected=rejected, **more)


def turns(*texts: str) -> list[dict[str, str]]:
    """user, assistant, user, ... messages."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# The class of each architecture, and what makes it different; windows and caps are small, so that they count on short texts.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "gemma2": ("Gemma2", {"sliding_window": 8, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {"sliding_window": 8, "head_dim": 8, "query_pre_attn_scalar": 8,
                          "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
}


def save_model(
    folder: Path, family: str = "llama", template: str | None = "chatml", kind: str = "bytes", seed: int = 0, **config: Any
) -> Path:
    """A random model of `family` (a key of FAMILIES, or gpt2) and its tokenizer, as save_pretrained writes them."""
    folder, key = Path(folder), (family, template, kind, seed, repr(sorted(config.items())))
    if key in SAVED:
        folder.mkdir(parents=True, exist_ok=True)
        files, state = SAVED[key]
        for name, content in files.items():
            (folder / name).write_bytes(content)
        torch.set_rng_state(state)  # as making it would have left it
        return folder
    fresh = not folder.is_dir() or not any(folder.iterdir())
    words = tokenizer(kind, template, **config.pop("special", {}))
    shape = {"vocab_size": len(words), **{f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 256, "initializer_range": 0.3, **config}
    torch.manual_seed(seed)
    if family in FAMILIES:
        kind, extra = FAMILIES[family]
        model = getattr(transformers, f"{kind}ForCausalLM")(
            getattr(transformers, f"{kind}TextConfig" if family == "gemma3" else f"{kind}Config")(**shape, **{**wide, **extra, **config}))
    else:
        model = GPT2LMHeadModel(GPT2Config(**shape, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3, **config))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    if fresh:
        SAVED[key] = {file.name: file.read_bytes() for file in folder.iterdir()}, torch.get_rng_state()
    return folder


def model_config(folder: Path | str, lora: dict[str, Any] | None = None, **settings: Any) -> ModelConfig:
    return ModelConfig(name="toy", path=str(folder), lora=LoraConfig(**(lora or {})), **settings)


def policy(folder: Path | str, lora: dict[str, Any] | None = None, data: dict[str, Any] | None = None, seed: int = 0,
           **settings: Any) -> CausalLM:
    return CausalLM(model_config(folder, lora, **settings), data_config(**(data or {})), TrustConfig(), torch.device("cpu"), "fp32", seed)


def rows(policy: Any, *examples: Example) -> list[Row]:
    return [Row(policy.tokenise(e), e.kind, e.label, e.weight, e.margin) for e in examples]


def micro(policy: Any, *examples: Example, view: str = "pairs") -> MicroBatch:
    made = rows(policy, *examples)
    return build(made, range(len(made)), view, policy.pad)


def oracle(policy: CausalLM, ids: list[int], trained: list[bool]) -> list[float]:
    """Log-probs of the trained tokens of one sequence, alone and unpadded: softmax in float64, summed by `math.fsum`."""
    with torch.no_grad(), policy.plainly():
        logits = policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    out = []
    for t, wanted in enumerate(trained):
        if wanted:
            row = logits[t - 1].tolist()
            top = max(row)
            out.append(row[ids[t]] - top - math.log(math.fsum(math.exp(z - top) for z in row)))
    return out
