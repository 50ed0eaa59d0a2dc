"""A causal language model as a policy: log-probs of completion tokens, sampling, LoRA, saving."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.config.doctor import require_bitsandbytes
from prefopt.config.schema import DataConfig, ModelConfig, SamplerConfig, TrustConfig
from prefopt.data.batch import MicroBatch, Row, build
from prefopt.data.records import Example, Message
from prefopt.data.tokenise import Branch, Tokeniser, Tokens
from prefopt.errors import UserError
from prefopt.policies.locate import Located, locate, plain
from prefopt.policies.logprob import Head, token_logprobs
from prefopt.policies.trees import attention_mask, plant

# How far two ways of scoring the same tokens may be apart, in nats: rounding of fp32, or of bf16 matrix products.
AGREEMENT = {"fp32": 1e-3, "bf16": 0.1}


@dataclass
class Reply:
    """A sampled completion: its token ids (end token included) and whether it ended by itself."""

    ids: list[int]
    finished: bool
    text: str


class LanguageModel(nn.Module):
    """What a causal LM and a reward model have in common: a transformers model, its tokenizer, precision, LoRA, saving."""

    task = "CAUSAL_LM"  # PEFT's word for it
    layout = "rows"  # how a micro-batch is computed: padded rows of edges, padded `trees` of shared prompts, or trees `packed` in one row

    def __init__(self, cfg: ModelConfig, data: DataConfig, trust: TrustConfig, device: torch.device, precision: str, seed: int):
        super().__init__()
        self.cfg, self.precision = cfg, precision
        located = locate(cfg)
        self.source = {"path": cfg.path, "where": located.where, "revision": located.revision, "fingerprint": located.fingerprint()}
        print(f"model: {located.where}", file=sys.stderr)
        self.tokenizer = _load_tokenizer(located, trust)
        frozen = torch.bfloat16 if precision == "bf16" and cfg.lora.enabled else torch.float32
        self.model = self.load(located, trust, frozen, seed).to(device)
        self.tokeniser = Tokeniser(self.tokenizer, data, _context(self.model.config), cfg.chat_template, cfg.thinking)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        if cfg.gradient_checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # by position: the argument's name has changed along with the method's
        if cfg.lora.enabled:
            self.model = _add_lora(self.model, cfg, seed, self.task)
        self.train()  # transformers hands models over in evaluation mode; dropout, if asked for, is for training

    def load(self, located: Located, trust: TrustConfig, dtype: torch.dtype, seed: int) -> nn.Module:
        """The model in `located`, without an adapter."""
        model, missing = _load_model(located, self.cfg, trust, dtype)
        if missing:
            raise UserError(f"{located.where} lacks weights ({', '.join(sorted(missing)[:3])}); it is no complete language model (a reward "
                            "model has no language head)")
        return model

    @property
    def inner(self) -> nn.Module:
        """The transformers model, with or without an adapter in its layers."""
        return self.model.get_base_model() if self.cfg.lora.enabled else self.model

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def autocast(self) -> torch.autocast:
        """bf16 matrix products, inside the policy, so that reference copies and sampling compute exactly as training does."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def tokenise(self, example: Example) -> Tokens:
        return self.tokeniser(example)

    @contextmanager
    def without_adapter(self):
        """The base model, for a reference that costs nothing."""
        with self.model.disable_adapter():
            yield

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """A plain transformers folder, or a PEFT adapter folder, with the tokenizer."""
        self.model.save_pretrained(folder, **({"selected_adapters": ["default"]} if self.cfg.lora.enabled else {}))
        self.tokenizer.save_pretrained(folder)


class CausalLM(LanguageModel):
    """`forward(micro) -> [N]` log-probs (nats, fp32) of the trained tokens of E edges, in edge order.

    Prompts are computed once for all of their completions (`policies/trees.py`) and logits are made in chunks (`policies/logprob.py`),
    where the architecture allows it: a few tokens are scored both ways when the model is loaded, and what differs is not used.
    """

    quantity = "token_logp"  # what `forward` returns

    def __init__(self, cfg: ModelConfig, data: DataConfig, trust: TrustConfig, device: torch.device, precision: str, seed: int):
        super().__init__(cfg, data, trust, device, precision, seed)
        self.share = self.fuse = False
        self.fuse = cfg.fused_head and self._agrees("model.fused_head", fuse=True)
        self.share = self.fuse and cfg.share_prompts and self._agrees("model.share_prompts", share=True)

    @property
    def layout(self) -> str:
        return "trees" if self.share else "rows"

    @property
    def scoring(self) -> str:
        """How log-probs are made, for the manifest."""
        return f"{'shared' if self.share else 'repeated'} prompts, {'chunked' if self.fuse else 'full'} logits"

    def forward(self, micro: MicroBatch) -> Tensor:
        targets = micro.input_ids[:, 1:][micro.trained[:, 1:]]
        with self.autocast():
            return token_logprobs(self._hidden(micro), self._head(), targets) if self.fuse else self._from_logits(micro, targets)

    def _hidden(self, micro: MicroBatch) -> Tensor:
        """[N, D] the hidden states that predict the trained tokens."""
        decoder, inputs = self.inner.get_decoder(), {"use_cache": False}
        if self.share and len(micro.tree) > len(micro.tree.unique_consecutive()):
            trees, config = plant(micro, self.pad), self.inner.config.get_text_config()
            mask = attention_mask(trees, config, self.cfg.attention, torch.float32)
            inputs |= {"input_ids": trees.input_ids, "position_ids": trees.positions, "attention_mask": mask}
            return decoder(**inputs).last_hidden_state.flatten(0, 1)[trees.predict]
        inputs |= {"input_ids": micro.input_ids, "attention_mask": micro.attention.long()}
        return decoder(**inputs).last_hidden_state[:, :-1][micro.trained[:, 1:]]

    def _head(self) -> Head:
        layer, config = self.inner.get_output_embeddings(), self.inner.config.get_text_config()
        if type(layer) is not nn.Linear:  # an adapter or a quantised matrix, whose `weight` is not what multiplies
            raise TypeError(f"its head is a {type(layer).__name__}")
        return Head(layer.weight, layer.bias, getattr(config, "final_logit_softcapping", None))

    def _from_logits(self, micro: MicroBatch, targets: Tensor) -> Tensor:
        """The plain way: rows of prompt and completion, all logits at once."""
        predict = micro.trained[:, 1:]  # the logits at t-1 score the token at t
        start = int(predict.any(0).float().argmax())  # earlier positions need no logits
        keep = micro.input_ids.shape[1] - start
        out = self.model(input_ids=micro.input_ids, attention_mask=micro.attention.long(), use_cache=False, logits_to_keep=keep)
        logits = out.logits[:, :-1][predict[:, start:]]  # [N, V]
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)

    @torch.no_grad()
    def _agrees(self, key: str, **change: bool) -> bool:
        """Whether a few tokens get the same log-probs after the `change` as by the plain way; says why if not."""
        generator = torch.Generator().manual_seed(0)
        size = self.inner.get_input_embeddings().weight.shape[0]
        ids = [torch.randint(size, (n,), generator=generator).tolist() for n in (9, 5, 7, 6, 3, 4)]
        rows = [Row(Tokens(ids[p], [Branch(r, [True] * len(r), True) for r in replies]), "pair")
                for p, replies in ((0, ids[1:3]), (3, ids[4:]))]
        micro, was_training = build(rows, [0, 1], "pairs", self.pad).to(self.device), self.training
        self.eval()
        try:
            with self.autocast():
                plain = self._from_logits(micro, micro.input_ids[:, 1:][micro.trained[:, 1:]])
            vars(self).update(change)
            gap = float((self(micro) - plain).abs().max())
            reason = None if gap <= AGREEMENT[self.precision] else f"log-probs would differ by {gap:.2g} nats"
        except Exception as error:  # an architecture without one of the parts, or a kernel that takes no such mask
            reason = f"{type(error).__name__}: {_line(error)}"
        finally:
            vars(self).update(dict.fromkeys(change, False))
            self.train(was_training)
        if reason:
            print(f"model: {key} is off for this model ({reason})", file=sys.stderr)
        return reason is None

    def prompt_ids(self, prompt: list[Message], chat: bool) -> list[int]:
        """Ids of a prompt to sample from."""
        return self.tokeniser.prompt_ids(prompt, chat)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampler: SamplerConfig, seed: int) -> list[Reply]:
        """One reply per prompt, at most as long as the context allows. The samples depend on `seed`, on the prompts, their order and
        `sampler.batch_size` only; global RNG state is left alone.
        """
        from transformers import GenerationConfig

        room = self.tokeniser.context - max(map(len, prompts), default=0)
        if room < 1:
            raise UserError(f"a prompt fills the model's context of {self.tokeniser.context} tokens; lower data.max_prompt_tokens")
        greedy = sampler.temperature == 0
        settings = GenerationConfig(
            max_new_tokens=min(sampler.max_new_tokens, room), do_sample=not greedy, temperature=None if greedy else sampler.temperature,
            top_p=None if greedy else sampler.top_p, top_k=None if greedy else 0, pad_token_id=self.pad,
            eos_token_id=sorted(self.tokeniser.ends), use_cache=True,
        )
        replies: list[Reply] = []
        was_training = self.model.training
        self.model.eval()
        # What a checkpoint ships (a repetition penalty, a minimum probability) would fill every setting left open here,
        # and the samples would not come from the policy's own distribution.
        inner = self.inner
        shipped, inner.generation_config = inner.generation_config, GenerationConfig()
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seed)
                for i in range(0, len(prompts), sampler.batch_size):
                    replies += self._generate(prompts[i : i + sampler.batch_size], settings)
        finally:
            inner.generation_config = shipped
            self.model.train(was_training)
        return replies

    def _generate(self, prompts: list[list[int]], settings: Any) -> list[Reply]:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt):], mask[row, width - len(prompt):] = torch.tensor(prompt), 1
        with self.autocast():
            made = self.model.generate(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), generation_config=settings)
        replies = []
        for new in made[:, width:].tolist():
            end = next((i for i, t in enumerate(new) if t in self.tokeniser.ends), None)
            kept = new if end is None else new[: end + 1]
            replies.append(Reply(kept, end is not None, self.decode(kept)))
        return replies


def load_tokeniser(cfg: ModelConfig, data: DataConfig, trust: TrustConfig) -> Tokeniser:
    """The tokeniser that `CausalLM` would have, without its weights."""
    if cfg.path is None and cfg.name.startswith("tiny-lm"):
        from prefopt.policies.tiny_lm import MODEL, build_tokenizer

        return Tokeniser(build_tokenizer(), data, MODEL["max_position_embeddings"], cfg.chat_template, cfg.thinking)
    located = locate(cfg, weights=False)
    context = _context(_load_config(located, trust))
    return Tokeniser(_load_tokenizer(located, trust), data, context, cfg.chat_template, cfg.thinking)


def _context(config: Any) -> int:
    """The longest sequence the model has positions for."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def _load_tokenizer(located: Located, trust: TrustConfig) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(located.folder, gguf_file=located.gguf_file, trust_remote_code=trust.remote_code)
    except Exception as error:
        raise _refusal("tokenizer", located, error) from error


def _load_config(located: Located, trust: TrustConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(located.folder, gguf_file=located.gguf_file, trust_remote_code=trust.remote_code)
    except Exception as error:
        raise _refusal("config", located, error) from error


def _load_model(located: Located, cfg: ModelConfig, trust: TrustConfig, dtype: torch.dtype, auto: str = "AutoModelForCausalLM",
                **settings: Any) -> tuple[nn.Module, set[str]]:
    """(model, names of weights that the folder does not have). `auto` is the class of transformers, `settings` go into its config."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # the run has one progress line of its own
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft asks transformers by the old name
    config = _load_config(located, trust)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) and cfg.attention != "eager":
        # Some versions of transformers leave the cap out without a word, others refuse.
        raise UserError(f"{located.where} caps its attention scores, which model.attention={cfg.attention} does not; "
                        "set model.attention=eager")
    fourbit = _four_bits() if cfg.quantize else {}
    for name, value in settings.items():
        setattr(config, name, value)
    for part in (config, config.get_text_config()):
        for name, value in list(vars(part).items()):
            # Published checkpoints name it differently: attention_dropout, resid_pdrop, hidden_dropout, ...
            if isinstance(value, (int, float)) and not isinstance(value, bool) and ("dropout" in name or name.endswith("pdrop")):
                setattr(part, name, cfg.dropout)
            elif name == "layerdrop":
                part.layerdrop = 0.0
    try:
        model, report = getattr(transformers, auto).from_pretrained(
            located.folder, config=config, gguf_file=located.gguf_file, dtype=dtype, attn_implementation=cfg.attention,
            trust_remote_code=trust.remote_code, use_safetensors=None if located.gguf_file else True, output_loading_info=True, **fourbit,
        )
        return plain(model) if located.gguf_file else model, set(report["missing_keys"])
    except Exception as error:
        raise _refusal("model", located, error) from error


def _four_bits() -> dict[str, Any]:
    """Loading straight into nf4 with double quantisation, computing in bf16: QLoRA's setting (arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    require_bitsandbytes()
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    # Quantising is work for the device that will hold the weights.
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}}


def _refusal(what: str, located: Located, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        return UserError(f"{located.where} wants to run its own Python code; allow it with trust.remote_code=true")
    folder = Path(located.folder)
    pickled = sorted(f.name for f in folder.glob("*.bin") if "model" in f.name)
    if what == "model" and pickled and not any(folder.glob("*.safetensors")):
        return UserError(f"{located.where} has its weights in {pickled[0]}, a pickle, which could run any code when it is loaded; "
                         "prefopt loads safetensors only. If you trust it, load it with transformers and write it anew (save_pretrained).")
    return UserError(f"the {what} of {located.where} cannot be loaded ({type(error).__name__}: {_line(error)})")


def _add_lora(model: nn.Module, cfg: ModelConfig, seed: int, task: str) -> nn.Module:
    """Adapters in fp32 on a frozen model; a fresh one starts as the identity. `task` is PEFT's type; SEQ_CLS trains the head too."""
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

    lora = cfg.lora
    if lora.adapter:
        folder = Path(lora.adapter).expanduser()
        if not (folder / "adapter_config.json").is_file():
            raise UserError(f"model.lora.adapter={lora.adapter}: no adapter_config.json there")
        try:
            config = PeftConfig.from_pretrained(str(folder))
            config.lora_dropout = lora.dropout  # a saved adapter brings its own, often 0.1
            model = PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=config)
        except Exception as error:  # another base model's shapes, another kind of adapter, a damaged file
            raise UserError(f"model.lora.adapter={lora.adapter} does not load ({type(error).__name__}: {_line(error)})") from error
    else:
        targets = lora.targets if lora.targets == "all-linear" else [t.strip() for t in lora.targets.split(",")]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                model = get_peft_model(
                    model, LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
                                      task_type=task)
                )
            except ValueError as error:
                raise UserError(f"model.lora.targets={lora.targets}: {_line(error)}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
