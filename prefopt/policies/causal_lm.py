"""A causal language model as a policy: log-probs of completion tokens, sampling, LoRA, saving."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.config.schema import DataConfig, ModelConfig, SamplerConfig, TrustConfig
from prefopt.data.batch import MicroBatch, Row, build
from prefopt.data.records import Example, Message
from prefopt.data.tokenise import Branch, Tokeniser, Tokens
from prefopt.errors import UserError
from prefopt.objectives.base import About
from prefopt.policies import packed
from prefopt.policies.asked import Asked, answer
from prefopt.policies.compiled import compile_layers, eagerly
from prefopt.policies.head import head_of, refuse_adapter_on_tied_head
from prefopt.policies.layout import hidden_states
from prefopt.policies.loading import add_lora, context_of, first_line, load_model, load_tokenizer
from prefopt.policies.locate import Located, locate
from prefopt.policies.logprob import Head, token_logprobs
from prefopt.policies.owned import consult
from prefopt.policies.race import Race
from prefopt.policies.save_split import save_split
from prefopt.policies.split import Hooks, is_split, whole_shape

# How far two ways of scoring the same tokens may be apart, in nats (reward models: in sizes of the hidden state): rounding of fp32, or of
# bf16 matrix products.
AGREEMENT = {"fp32": 1e-3, "bf16": 0.25}


@dataclass
class Reply:
    """A sampled completion: its token ids (end token included) and whether it ended by itself."""

    ids: list[int]
    finished: bool
    text: str

    @property
    def branch(self) -> Branch:
        """How it is scored: each of its tokens."""
        return Branch(self.ids, [True] * len(self.ids), self.finished)


class LanguageModel(nn.Module):
    """What a causal LM and a reward model have in common: a transformers model, its tokenizer, precision, LoRA, saving, and how a
    micro-batch is laid out (`policies/layout.py`): a few tokens are scored in each wanted layout when the model is loaded, and what
    differs from padded rows is not used.
    """

    task = "CAUSAL_LM"  # PEFT's word for it
    difference = "log-probs would differ by {:.2g} nats"

    def __init__(self, cfg: ModelConfig, data: DataConfig, trust: TrustConfig, device: torch.device, precision: str, seed: int,
                 split: dict[str, Any] | None = None):
        super().__init__()
        self.cfg, self.precision = cfg, precision
        located = locate(cfg)
        if split and located.gguf_file:
            print("model: weights of a GGUF file are read as a whole on every process, and split later", file=sys.stderr)
            split = None
        self.source = {"path": cfg.path, "where": located.where, "revision": located.revision, "fingerprint": located.fingerprint()}
        print(f"model: {located.where}", file=sys.stderr)
        self.tokenizer = load_tokenizer(located, trust)
        frozen = torch.bfloat16 if precision == "bf16" and cfg.lora.enabled else torch.float32
        self.model = self.load(located, trust, frozen, seed, split).to(device)
        self.tokeniser = Tokeniser(self.tokenizer, data, context_of(self.model.config), cfg.chat_template, cfg.thinking)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        if cfg.gradient_checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # by position: the argument's name has changed along with the method's
        if cfg.lora.enabled:
            self.model = add_lora(self.model, cfg, seed, self.task)
        config = self.inner.config.get_text_config()
        self.attention = packed.plain_attention(config, cfg.attention)
        self.kernel = packed.packed_kernel(config, cfg.attention, device, precision, cfg.dropout)
        self.layout, self.share = "rows", False
        if cfg.compile:
            compile_layers(self.decoder, device)
            if device.type == "cpu" and self.kernel:  # a loop over sequences there, which breaks every layer's program into pieces
                if cfg.attention != "auto":
                    raise UserError(f"model.compile=true does not go with model.attention={cfg.attention} on a CPU; set it to auto")
                self.kernel = None
        self.hooks = Hooks(self, self.outside) if split else None
        self.train()  # transformers hands models over in evaluation mode; dropout, if asked for, is for training

    def load(self, located: Located, trust: TrustConfig, dtype: torch.dtype, seed: int, split: dict[str, Any] | None) -> nn.Module:
        """The model in `located`, without an adapter."""
        model, missing = load_model(located, self.cfg, trust, dtype, split=split)
        if missing:
            raise UserError(f"{located.where} lacks weights ({', '.join(sorted(missing)[:3])}); it is no complete language model (a reward "
                            "model has no language head)")
        return model

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copy.deepcopy, which takes no compiled programs along."""
        super().__setstate__(state)
        if self.cfg.compile:
            compile_layers(self.decoder, self.device)

    @property
    def inner(self) -> nn.Module:
        """The transformers model, with or without an adapter in its layers."""
        return self.model.get_base_model() if self.cfg.lora.enabled else self.model

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return self.inner.get_decoder()

    @property
    def outside(self) -> nn.Module | None:
        """The part whose weights `forward` uses by itself."""
        return None

    @property
    def layout(self) -> str:
        """How a micro-batch is computed: `rows`, `trees` or `packed`. Setting it sets the attention kernel."""
        return self._layout

    @layout.setter
    def layout(self, layout: str) -> None:
        self._layout = layout
        self._attend(packed.NAMES[self.kernel] if layout == "packed" else self.attention)

    def _attend(self, name: str) -> None:
        """Has the layers compute attention by the function that transformers knows by this name, from now on: a backward pass with
        checkpointing runs them again."""
        if self.kernel:
            packed.register()
            self.inner.set_attn_implementation(name)

    @contextmanager
    def plainly(self):
        """In it the transformers model can be called as any other: kernels of packed rows know neither masks nor caches."""
        self._attend(self.attention)
        try:
            yield
        finally:
            self.layout = self.layout

    def _choose_layout(self) -> None:
        """The fastest of the layouts that are wanted and give the scores of padded rows."""
        share = self.cfg.share_prompts
        wanted = [("packed", share, f"model.attention={self.kernel}")] if self.kernel else []
        if share:
            wanted += [("trees", True, "model.share_prompts")]
            wanted += [("packed", False, f"model.attention={self.kernel}, without shared prompts,")] if self.kernel else []
        for layout, shared, key in wanted:
            if self._agrees(key, layout=layout, share=shared):
                return

    @torch.no_grad()
    def _agrees(self, key: str, **change: Any) -> bool:
        """Whether a few tokens get the same scores after the `change` as by the plain way. It stays if so; if not, that is said."""
        generator = torch.Generator().manual_seed(0)
        size = whole_shape(self.inner.get_input_embeddings().weight)[0]
        ids = [torch.randint(size, (n,), generator=generator).tolist() for n in (9, 5, 7, 6, 3, 4)]
        rows = [Row(Tokens(ids[p], [Branch(r, [True] * len(r), True) for r in replies]), "pair")
                for p, replies in ((0, ids[1:3]), (3, ids[4:]))]
        micro, was_training = build(rows, [0, 1], "pairs", self.pad).to(self.device), self.training
        before = {name: getattr(self, name) for name in change}
        self.eval()
        try:
            with self.autocast(), eagerly(self.cfg.compile):
                plain = self._probe(micro, plain=True)
                self._set(change)
                gap = float((self._probe(micro) - plain).abs().max())
            reason = None if gap <= AGREEMENT[self.precision] else self.difference.format(gap)
        except Exception as error:  # an architecture without one of the parts, or a kernel that takes no such mask
            reason = f"{type(error).__name__}: {first_line(error)}"
        finally:
            self.train(was_training)
        if reason:
            self._set(before)
            print(f"model: {key} is off for this model ({reason})", file=sys.stderr)
        return reason is None

    def _set(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def states(self, micro: MicroBatch, layers: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """([P, d] hidden states, [N] places that predict the trained tokens, [E] places of the edges' last tokens); with `layers` the
        states are [P, L, d], those of all layers."""
        attention = self.kernel if self.layout == "packed" else self.attention
        config = self.inner.config.get_text_config()
        with eagerly(layers and self.cfg.compile):  # the hooks that gather them are not to be compiled
            return hidden_states(self.decoder, config, micro, self.pad, self.layout, attention, self.share, layers)

    @property
    def about(self) -> About:
        """What a module of the objective may know."""
        config = self.inner.config.get_text_config()
        return About(config.hidden_size, config.num_hidden_layers)

    @property
    def placed(self) -> str:
        """How prompts and completions are computed, in words."""
        where = {"rows": f"in rows ({self.attention})", "trees": f"in trees ({self.attention})", "packed": f"packed ({self.kernel})"}
        return f"{'shared' if self.share else 'repeated'} prompts {where[self.layout]}{', compiled layers' * self.cfg.compile}"

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def autocast(self, keep: bool = False) -> torch.autocast:
        """bf16 matrix products, inside the policy, so that reference copies and sampling compute exactly as training does. A pass uses each
        weight once; only sampling should `keep` them in bf16, which takes memory for all of them at a time (under ZeRO 3 as well).
        """
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=keep)

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
        if self.hooks and self.hooks.blocks:
            save_split(self.model, folder, self.hooks)
        else:
            self.model.save_pretrained(folder, **({"selected_adapters": ["default"]} if self.cfg.lora.enabled else {}))
        self.tokenizer.save_pretrained(folder)


class CausalLM(LanguageModel):
    """`forward(micro) -> [N]` log-probs (nats, fp32) of the trained tokens of E edges, in edge order; with `asked` a dict that holds more.

    Prompts are computed once for all of their completions (`policies/layout.py`) and logits are made in chunks (`policies/logprob.py`),
    where the architecture allows it.
    """

    quantity = "token_logp"  # what `forward` returns

    def __init__(self, cfg: ModelConfig, data: DataConfig, trust: TrustConfig, device: torch.device, precision: str, seed: int,
                 split: dict[str, Any] | None = None):
        super().__init__(cfg, data, trust, device, precision, seed, split)
        refuse_adapter_on_tied_head(self.inner, f"model.lora.{'adapter' if cfg.lora.adapter else 'targets'}")
        self.fuse = False
        self.fuse = cfg.fused_head and self._agrees("model.fused_head", fuse=True)
        if self.fuse:
            self._choose_layout()

    @property
    def outside(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @property
    def scoring(self) -> str:
        """How log-probs are made, for the manifest."""
        return f"{self.placed}, {'chunked' if self.fuse else 'full'} logits"

    def forward(self, micro: MicroBatch, asked: Asked | None = None) -> Tensor | dict[str, Any]:
        targets = micro.input_ids[:, 1:][micro.trained[:, 1:]]
        with self.autocast():
            if asked is not None:
                states, head = self._hidden(micro, asked.layers), self._head()
                hidden, layers = (states[:, -1], states) if asked.layers else (states, None)
                made = answer(asked, token_logprobs(hidden, head, targets), hidden, head, layers)
                return made | consult(self, micro, hidden, asked.given) if asked.module else made
            return token_logprobs(self._hidden(micro), self._head(), targets) if self.fuse else self._from_logits(micro, targets)

    def _hidden(self, micro: MicroBatch, layers: bool = False) -> Tensor:
        """[N, d] the hidden states that predict the trained tokens; [N, L, d] those of all layers."""
        hidden, predict, _ = self.states(micro, layers)
        return hidden[predict]

    def _probe(self, micro: MicroBatch, plain: bool = False) -> Tensor:
        return self._from_logits(micro, micro.input_ids[:, 1:][micro.trained[:, 1:]]) if plain else self(micro)

    def _head(self) -> Head:
        return head_of(self.inner)

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

    def prompt_ids(self, prompt: list[Message], chat: bool) -> list[int]:
        """Ids of a prompt to sample from."""
        return self.tokeniser.prompt_ids(prompt, chat)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampler: SamplerConfig, seed: int, places: Sequence[int] | None = None) -> list[Reply]:
        """One reply per prompt, at most as long as the context allows: drawn, or at temperature 0 the most likely one that `sampler.beams`
        beams find (one beam: word by word). The noise of a reply follows from (seed, its place), where `places` (0, 1, ... if not given)
        are those of the prompts in what they are a part of: what is drawn beside it changes a reply by the rounding of log-probs only.
        """
        from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        room = self.tokeniser.context - max(map(len, prompts), default=0)
        if room < 1:
            raise UserError(f"a prompt fills the model's context of {self.tokeniser.context} tokens; lower data.max_prompt_tokens")
        greedy = sampler.temperature == 0
        # Scores of beams are sums of log-probs; without a penalty on length they only fall, so the search may end when none can still win.
        search = {"num_beams": sampler.beams, "length_penalty": 0.0, "early_stopping": "never"} if sampler.beams > 1 else {}
        settings = GenerationConfig(max_new_tokens=min(sampler.max_new_tokens, room), do_sample=False, pad_token_id=self.pad,
                                    eos_token_id=sorted(self.tokeniser.ends), use_cache=True, **search)
        places = range(len(prompts)) if places is None else places
        replies: list[Reply] = []
        was_training = self.model.training
        self.model.eval()
        # What a checkpoint ships (a repetition penalty, a minimum probability) would fill every setting left open here,
        # and the samples would not come from the policy's own distribution.
        inner = self.inner
        shipped, inner.generation_config = inner.generation_config, GenerationConfig()
        try:
            with self.plainly():
                for i in range(0, len(prompts), sampler.batch_size):
                    part = slice(i, i + sampler.batch_size)
                    race = None if greedy else Race(seed, places[part], self.device)
                    drawing = [TemperatureLogitsWarper(sampler.temperature), TopPLogitsWarper(sampler.top_p), race] if race else []
                    replies += self._generate(prompts[part], settings, LogitsProcessorList(drawing))
                    if race:
                        race.check()
        finally:
            inner.generation_config = shipped
            self.model.train(was_training)
        return replies

    def _generate(self, prompts: list[list[int]], settings: Any, processors: Any) -> list[Reply]:
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt):], mask[row, width - len(prompt):] = torch.tensor(prompt), 1
        with self.autocast(keep=not any(map(is_split, self.parameters()))), eagerly(self.cfg.compile):
            made = self.model.generate(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), generation_config=settings,
                                       logits_processor=processors)
        replies = []
        for new in made[:, width:].tolist():
            end = next((i for i, t in enumerate(new) if t in self.tokeniser.ends), None)
            kept = new if end is None else new[: end + 1]
            replies.append(Reply(kept, end is not None, self.decode(kept)))
        return replies
