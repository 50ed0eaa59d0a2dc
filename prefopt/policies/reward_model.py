"""Reward models as policies: `forward(micro) -> [E]` one reward per edge, fp32. They write nothing and have no log-probs."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.config.schema import DataConfig, TrustConfig
from prefopt.data.batch import MicroBatch
from prefopt.errors import UserError
from prefopt.policies.causal_lm import LanguageModel
from prefopt.policies.loading import load_model
from prefopt.policies.locate import Located
from prefopt.policies.packed import KERNELS
from prefopt.policies.split import make_whole
from prefopt.policies.tabular import Table

# Beside a saved reward model: what decides how a text is rendered for it, and what an adapter belongs to.
CARD = "prefopt_reward.json"
RENDERING = ("render", "max_prompt_tokens", "max_completion_tokens")


class RewardModel(LanguageModel):
    """A scalar head on the hidden state of the last token: AutoModelForSequenceClassification of transformers with one label.

    A causal LM gets a fresh head, normal with standard deviation 1 / (d + 1) for hidden states of d numbers, so that rewards start near
    0; a saved reward model brings its own. The head is computed in fp32, whatever the rest is computed in.
    """

    quantity = "reward"  # what `forward` returns
    task = "SEQ_CLS"
    difference = "hidden states would differ by {:.2g} of their size"

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self._choose_layout()

    def load(self, located: Located, trust: TrustConfig, dtype: torch.dtype, seed: int, split: dict[str, Any] | None) -> nn.Module:
        with _quiet(), torch.random.fork_rng(devices=[]):  # transformers draws the missing head unseeded, and warns; it is made here
            model, missing = load_model(located, self.cfg, trust, dtype, "AutoModelForSequenceClassification", split, num_labels=1)
        head = getattr(model, "score", None)
        if not isinstance(head, nn.Linear):
            raise UserError(f"{located.where}: {type(model).__name__} has no linear head named score on its last token, so it cannot be "
                            "trained or used as a reward model; use a decoder-only language model")
        if other := sorted(name for name in missing if not name.startswith("score.")):
            raise UserError(f"{located.where} lacks weights ({', '.join(other[:3])}); it is no complete model")
        if split:
            make_whole(head)  # it is small, and about to change
        if missing:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1)
            head.weight.data = drawn
            if head.bias is not None:
                nn.init.zeros_(head.bias)
        head.float()
        return model

    @property
    def decoder(self) -> nn.Module:
        return self.inner.base_model

    @property
    def scoring(self) -> str:
        """How rewards are made, for the manifest."""
        return self.placed

    def forward(self, micro: MicroBatch) -> Tensor:
        state = self._last(micro)
        with torch.autocast(self.device.type, enabled=False):
            return self.inner.score(state.float()).squeeze(-1)

    def _last(self, micro: MicroBatch) -> Tensor:
        """[E, d] the hidden states of the edges' last tokens."""
        with self.autocast():
            hidden, _, last = self.states(micro)
        return hidden[last]

    def _probe(self, micro: MicroBatch, plain: bool = False) -> Tensor:
        """[E] those states along a random direction, in units of their size: the rewards of a fresh head are too small to tell by."""
        state = self._last(micro).cpu().double()
        direction = torch.randn(state.shape[1], generator=torch.Generator().manual_seed(0), dtype=state.dtype)
        return state @ direction / state.norm(dim=1)

    def save(self, folder: Path) -> None:
        """A plain folder for AutoModelForSequenceClassification, or a PEFT adapter folder, with tokenizer, chat template and card."""
        if self.tokeniser.template is not None:
            self.tokenizer.chat_template = self.tokeniser.template
        # transformers finds the last token of a row by comparing with the padding token, wrong where replies end with that token; without
        # a padding token it reads one row at a time, and rightly.
        self.model.config.get_text_config().pad_token_id = None if self.pad in self.tokeniser.ends else self.pad
        super().save(folder)
        cfg = replace(self.cfg, attention="auto") if self.cfg.attention in KERNELS else self.cfg  # it may be used where there is none
        write_card(folder, {"model": asdict(cfg), "data": {key: getattr(self.tokeniser.cfg, key) for key in RENDERING}})


class RewardTable(Table):
    """reward(x, y) = rewards[x][y] in the bandit world; starts at 0."""

    quantity = "reward"

    def __init__(self, device: torch.device):
        super().__init__(device)
        nn.init.zeros_(self.logits)

    def forward(self, micro: MicroBatch) -> Tensor:
        return self.logits[micro.input_ids[:, 0], micro.input_ids[:, 1]]

    def save(self, folder: Path) -> None:
        super().save(folder)
        write_card(folder, {"model": {"kind": "tabular"}, "data": {}})


def write_card(folder: Path, card: dict) -> None:
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def rendering(card: dict) -> DataConfig:
    """How texts are rendered and cut for the reward model of this card: prompts lose their start, replies their end."""
    limits = {key: card["data"][key] for key in RENDERING if key in card["data"]}
    return DataConfig(name="reward", source="files", on_long_prompt="keep_end", **limits)


@contextmanager
def _quiet():
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
