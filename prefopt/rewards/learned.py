"""A trained reward model as a reward: found, checked, frozen, and asked for many texts at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from prefopt.config.schema import DataConfig, LoraConfig, ModelConfig, TrustConfig
from prefopt.data.batch import Row, build, split_step
from prefopt.data.records import BadRow, Completion, Example
from prefopt.data.tokenise import Branch, Tokens
from prefopt.errors import UserError
from prefopt.policies.locate import Located, locate
from prefopt.policies.reward_model import CARD, RewardModel, RewardTable, rendering

TRAIN_ONE = "train a reward model with algo=reward_bt and give its run: reward.path=RUN"


class LearnedReward:
    """The reward of each example's first completion by the model at `path`: a run of algo=reward_bt, its saved model, or a sequence
    classification model with one label, in a folder or on the hub.

    Texts are rendered with the model's own tokenizer and template. What is longer than it was trained on (or than its context) loses the
    start of its prompt and the end of its reply, as in training; `cut` counts such texts. `source` tells where the model is from.
    """

    def __init__(self, path: str, data: DataConfig, trust: TrustConfig, device: torch.device, precision: str):
        self.path, self.cut, self.said = path, 0, 0
        folder, card = find(path)
        tabular = card["model"].get("kind") == "tabular"
        if tabular != (data.source == "bandit"):
            kinds = ("of the bandit world", "text") if tabular else ("for text", "the bandit world")
            raise UserError(f"reward.path={path} is a reward model {kinds[0]}, and data={data.name} is {kinds[1]}; {TRAIN_ONE}")
        if tabular:
            self.model, self.budget = RewardTable(device), 100_000
            self.model.restore(folder)
        else:
            cfg = model_config(path, folder, card)
            self.model, self.budget = RewardModel(cfg, rendering(card), trust, device, precision, seed=0), cfg.micro_batch_tokens
        self.model.eval().requires_grad_(False)
        self.source = {**self.model.source, "path": path}
        if folder is not None:  # the head, or the adapter, that is loaded over a base model
            self.source["fingerprint"] = Located(str(folder), None, path).fingerprint()

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example]) -> list[float]:
        rows = [Row(self._tokens(e), "demonstration") for e in examples]
        out = [0.0] * len(rows)
        for chosen in split_step(rows, range(len(rows)), "demonstrations", self.budget, 1, self.model.layout, self.model.share)[0]:
            micro = build(rows, chosen, "demonstrations", self.model.pad).to(self.model.device)
            for row, reward in zip(chosen, self.model(micro).tolist(), strict=True):
                out[row] = reward
        self._say_cut()
        return out

    def _tokens(self, example: Example) -> Tokens:
        # A policy's reply is a message that nobody has marked as trained; unmarked, the tokeniser would take it for context.
        said = Completion([replace(m, train=m.role == "assistant") for m in example.completions[0].messages])
        one = replace(example, prompt=example.bare or example.prompt, completions=[said], kind="demonstration")
        try:
            tokens = self.model.tokenise(one)
        except BadRow as reason:
            if one.completions[0].text.strip() or isinstance(self.model, RewardTable):
                raise UserError(f"{example.origin}: the reward model at {self.path} cannot read this: {reason}") from reason
            # A policy may end at once; such a reply is its end token, where the template has nothing else to show.
            ids = self.model.tokeniser.prompt_ids(one.prompt, one.chat)[1 - self.model.tokeniser.context :]
            tokens = Tokens(ids, [Branch([self.model.tokenizer.eos_token_id], [True], True)])
        self.cut += bool(tokens.cut_prompt or any(tokens.cut_completions))
        return tokens

    def _say_cut(self) -> None:
        """Whenever their number has doubled."""
        if self.cut and self.cut >= 2 * self.said:
            self.said = self.cut
            print(f"reward: {self.cut} texts so far were too long for the reward model; it read them without the start of the prompt or "
                  "the end of the reply", file=sys.stderr)


def identity_of(path: str, precision: str) -> dict[str, Any]:
    """What tells the rewards by the model at `path` apart from those of others: its weights, how it reads texts, and what it computes in.
    Loads nothing."""
    folder, card = find(path)
    kept = {"path": path, "fingerprint": Located(str(folder), None, path).fingerprint() if folder else None, "precision": precision}
    if card["model"].get("kind") == "tabular":
        return kept
    cfg = model_config(path, folder, card)
    read = {"rendering": card["data"], "template": cfg.chat_template, "thinking": cfg.thinking, "quantize": cfg.quantize}
    return {**kept, "base": locate(cfg).fingerprint(), **read}


def find(path: str) -> tuple[Path | None, dict[str, Any]]:
    """(the folder that holds the model, None for a hub id; its card). Raises `UserError` that says what is there instead."""
    given = Path(path).expanduser()
    if not given.is_dir():
        if path.startswith((".", "/", "~")) or given.exists():
            raise UserError(f"reward.path={path}: there is no such folder (looked from {Path.cwd()})")
        return None, {"model": {}, "data": {}}
    folder = given
    if (given / "config.yaml").is_file():
        folder = given / "model"
        settings = yaml.safe_load((given / "config.yaml").read_text(encoding="utf-8")) or {}
        algo = (settings.get("algo") or {}).get("name")
        if folder.is_dir() and not (folder / CARD).is_file():
            raise UserError(f"reward.path={path} holds a run of algo={algo}, which trains no reward model; {TRAIN_ONE}")
        if not folder.is_dir():
            raise UserError(f"reward.path={path} holds a run of algo={algo} that is not finished: its model is written at the end; "
                            "let it finish, or choose another")
    if (folder / CARD).is_file():
        try:
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
            return folder, {"model": dict(card["model"]), "data": dict(card["data"])}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / CARD} is not what prefopt wrote ({error}); put the run's own file back") from error
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"reward.path={path} holds an adapter that prefopt has not trained as a reward model; merge it into its base "
                        f"model, or {TRAIN_ONE}")
    if not (folder / "config.json").is_file():
        raise UserError(f"reward.path={path} holds neither a run nor a saved model (no config.yaml, no config.json); {TRAIN_ONE}")
    return folder, {"model": {}, "data": {}}


def model_config(path: str, folder: Path | None, card: dict[str, Any]) -> ModelConfig:
    """How to load it. Only a model that its own files call a sequence classifier with one label is a reward model."""
    try:
        settings = {**card["model"], "lora": LoraConfig(**card["model"].get("lora", {}))}
        cfg = ModelConfig(**{"name": Path(path).name, "path": path, **settings})
    except TypeError as error:
        raise UserError(f"reward.path={path} was saved by another version of prefopt ({error}); train it anew") from error
    cfg.dropout, cfg.gradient_checkpointing = 0.0, False
    if cfg.lora.enabled:
        cfg.lora.adapter = str(folder)
        return cfg
    cfg.chat_template = None  # it was saved with the tokenizer
    cfg.path, cfg.gguf_file, cfg.wheel, cfg.revision = str(folder or path), None, None, None
    try:
        located = locate(cfg, weights=False)
    except UserError as error:
        raise UserError(f"reward.path={path}: {error}") from error
    config = json.loads((Path(located.folder) / "config.json").read_text(encoding="utf-8"))
    kinds = config.get("architectures") or ["unnamed"]
    labels = len(config.get("id2label") or (0, 1))
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(f"reward.path={path} holds a {kinds[0]}, which gives no rewards; {TRAIN_ONE}")
    if config.get("num_labels", labels) != 1:
        raise UserError(f"reward.path={path} holds a classifier with {labels} labels; a reward model has one")
    return cfg
