"""How a run gets its reference's scores: which way costs least, and the filling of the store before the first step."""

from __future__ import annotations

import hashlib
import io
import json
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from prefopt.config.noise import BY_A_MODEL
from prefopt.config.schema import TrainConfig
from prefopt.data.batch import Row, step_rows
from prefopt.data.tokenise import Branch, Tokens
from prefopt.errors import RunFailed, UserError
from prefopt.objectives.base import Objective
from prefopt.policies.asked import Asked
from prefopt.policies.reference import AdapterOff, AsLoaded, Provider, Reloaded, Stored, make_reference
from prefopt.policies.split import Hooks, alone
from prefopt.policies.store import Store, entry_key, evict, reference_root
from prefopt.training import loading
from prefopt.training.engine import quantities
from prefopt.training.parallel import from_main
from prefopt.training.rundir import differences, read_manifest
from prefopt.training.source import OfflineSource

CHUNK = 16  # micro-batches of a process to a shard: what a kill can cost, and how often the work of others is looked at
TURN = 30.0  # seconds between two looks at whether another run still fills the store
ROOMIER = 4  # without gradients a GPU holds so many times the tokens of a training micro-batch


@dataclass
class References:
    """`reference` is what the objective reads, `initial` what KL is measured against; `about` goes into the manifest."""

    reference: Provider | None
    initial: Provider | None
    about: dict[str, Any] = field(default_factory=dict)


def make_references(cfg: TrainConfig, policy: nn.Module, objective: Objective, source: OfflineSource, held_out: Sequence[Row],
                    steps: int, accelerator: Accelerator) -> References:
    """Call it before the first step and before a checkpoint is loaded, where the policy still stands where it starts.

    With the store, the rows that `steps` of `source` visit, and those `held_out`, get the reference's scores as `stored["reference"]`.
    """
    which, moves, model = cfg.reference.policy, cfg.reference.refresh != "never", cfg.model
    reads = "reference" in objective.quantities
    kl = (cfg.evaluation.kl or cfg.source.judge == "policy") and policy.quantity != "reward"  # it is a measure of samples
    may_store = cfg.reference.store != "off" and cfg.model.kind != "tabular"
    reload = may_store and not (model.frozen or moves)  # a second model need not stay in memory
    stored: Stored | None = None
    load = _loader(cfg, policy, accelerator)
    about: dict[str, Any] = {}
    live = f"it moves (reference.refresh={cfg.reference.refresh})" if moves else ""
    if cfg.model.kind == "diffusion" and not cfg.noise.pool:
        live = "every visit has new draws of noise (noise=pool keeps a few, and what the reference says of them)"
    if cfg.model.kind == "diffusion" and cfg.noise.plan in BY_A_MODEL:
        live = f"noise.plan={cfg.noise.plan} finds where pictures are scored while it trains"
    if "reference" in objective.states_of:
        live = f"{type(objective).__name__} reads more than its log-probs"
    if reads and may_store and live and cfg.source.kind == "offline":
        if accelerator.is_main_process:
            print(f"reference: live, for {live}; nothing is kept in the store", file=sys.stderr)
    elif reads and may_store and cfg.source.kind == "offline":
        stored, about = store_or_not(cfg, policy, objective, source, held_out, steps, accelerator)
    if stored:
        reference = stored
    elif reads or (kl and not reload):
        reference = make_reference(policy, which, moves, again=load)
    else:
        reference = Reloaded(load) if kl else None
    initial = None
    if kl:  # KL is to the policy the run started from, whatever the objective's reference is
        if not stored and not moves and (which == "initial" or not model.adapter):
            initial = reference
        else:
            initial = Reloaded(load) if stored and reload else make_reference(policy, "initial", name="start", again=load)
    return References(reference, initial, {"reference": reference.how if reference else "none", **about})


def _loader(cfg: TrainConfig, policy: nn.Module, accelerator: Accelerator) -> Callable[[], nn.Module]:
    """Loads the policy that the run started from once more."""
    model = replace(cfg.model, revision=policy.source["revision"] or cfg.model.revision)
    expected = policy.source["fingerprint"]

    def load() -> nn.Module:
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), redirect_stderr(io.StringIO()):  # what there is to say was said at the start
            again = loading.again(cfg, model, accelerator)
            if cfg.model.kind == "diffusion":
                again.encodings = policy.encodings
        if again.source["fingerprint"] != expected:
            raise UserError(f"the weights of {again.source['where']} have changed since the run started from them, so KL to them cannot be "
                            "measured; put them back, or set evaluation.kl=false")
        return again

    return load


# ---- what it would cost ------------------------------------------------------------------------------


def visits(source: OfflineSource, steps: int) -> list[int]:
    """How often each row of the source is in one of the steps of a run that has `steps` of them."""
    out, size = [0] * len(source.rows), source.batch_size
    for rows, count, seed in source.shares(steps):
        epochs, rest = divmod(count, -(-len(rows) // size))
        for row in rows:
            out[row] += epochs
        if many := min(rest * size, len(rows)):
            for i in step_rows(len(rows), many, epochs * -(-len(rows) // many), seed):  # the rows that an epoch begins with
                out[rows[i]] += 1
    return out


def evaluations(steps: int, every: int | None) -> int:
    """How often a run of so many steps evaluates: at the start, every so often, and at the end."""
    every = every or max(1, -(-steps // 5))
    return 1 + steps // every + (steps % every != 0)


def tree_tokens(row: Row) -> int:
    """Tokens of a row, each of its prompts once."""
    return sum(len(tree.prompt) + sum(len(b.ids) for b in tree.branches) for tree in row.trees("pairs"))


def replies_of(row: Row) -> list[Branch]:
    """Everything that may be scored of a row, in the order of `Row.stored`."""
    return [branch for _, branch in row.everything()]


def missing_tokens(row: Row, keys: Sequence[bytes], missing: Collection[bytes]) -> int:
    """Tokens of those replies of a row that are `missing`, each of their prompts once."""
    left = [each for each, key in zip(row.everything(), keys, strict=True) if key in missing]
    return sum(map(len, {tuple(prompt) for prompt, _ in left})) + sum(len(branch.ids) for _, branch in left)


# ---- the store -----------------------------------------------------------------------------------------


def identity_of(cfg: TrainConfig, policy: nn.Module) -> dict[str, Any]:
    """Everything about the reference and the rendering of rows that its log-probs may depend on, in parts that people can read."""
    of_adapter = cfg.reference.policy == "initial" and cfg.model.adapter
    weights = policy.source["fingerprint"] or _hash((n, p) for n, p in policy.named_parameters() if "lora_" not in n)
    adapter = _hash(policy.trainable().items()) if of_adapter else None
    if cfg.model.kind == "diffusion":
        mirrored = {"flip": True} if cfg.data.flip else {}  # of half of the draws the mirror image is scored
        return {"weights": weights, "adapter": adapter, **policy.identity(), **mirrored}
    tokeniser, data = policy.tokeniser, cfg.data
    # Scoring has no dropout and no cache, and a folder may be moved.
    config = {k: v for k, v in policy.inner.config.to_dict().items()
              if "drop" not in k and k not in ("_name_or_path", "transformers_version", "use_cache")}
    return {
        "weights": weights,
        "adapter": adapter,
        "architecture": _short(json.dumps(config, sort_keys=True, default=str)),
        "tokenizer": _short(f"{tokeniser.adds_bos} {tokeniser.tokenizer.backend_tokenizer.to_str()}"),
        "chat_template": _short(repr((tokeniser.template, tokeniser.thinking, sorted(tokeniser.ends)))),
        "render": data.render,
        "max_prompt_tokens": data.max_prompt_tokens,
        "max_completion_tokens": data.max_completion_tokens,
        "on_long_prompt": data.on_long_prompt,
        "context": tokeniser.context,
        "precision": cfg.hardware.precision,
        "dtype": str(policy.inner.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "quantize": cfg.model.quantize,
        "attention": cfg.model.attention,
        "scoring": policy.scoring,
        "quantity": policy.quantity,
    }


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _hash(tensors: Any) -> str:
    """sha256 over named tensors, for weights that no file stands for."""
    h = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        h.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        h.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def store_or_not(cfg: TrainConfig, policy: nn.Module, objective: Objective, source: OfflineSource, held_out: Sequence[Row], steps: int,
                 accelerator: Accelerator, scorer: str = "reference") -> tuple[Stored | None, dict[str, Any]]:
    """Decides; if it is chosen, fills the store and gives its scores to the rows as those of `scorer`, which is `policy` by `cfg.model`.
    With a line about why, and what the manifest keeps of it. The main process reads and writes, the others score
    their share."""
    main, began = accelerator.is_main_process, read_manifest(Path(cfg.run_dir))
    name = "store" if scorer == "reference" else f"{scorer}_store"  # in the manifest
    often = visits(source, steps)
    every = [row for row, count in zip(source.rows, often, strict=True) if count] + list(held_out)
    # Scored are what the scorer is asked about: extra sequences may be for others, and get zeros.
    rows = every if scorer in objective.extra_scorers else [replace(row, extra=[]) for row in every]
    value = objective.soft_value() if "value" in objective.quantities[scorer] else None
    level = "tokens" if value or "token_logp" in objective.quantities[scorer] or source.draws is not None else "sums"
    model, identity = cfg.model, identity_of(cfg, policy)
    if value:  # a number per token as well, filed apart
        identity["quantity"] = "value, weight {:g}, temperature {:g}".format(*value)
    store, how, use, keys = None, "", False, []
    if main:
        if (known := began.get(name)) and (changed := differences(known["identity"], identity)):
            raise UserError(f"{cfg.run_dir} began with another {scorer} than this command gives it ({'; '.join(changed)}). Put back what "
                            "has changed, or start anew in another hydra.run.dir.")
        keys = [[entry_key(prompt, b.ids, b.mask) for prompt, b in row.everything()] for row in rows]
        wanted = {key for row in keys for key in row}
        store = Store(identity, wanted, level, policy.source["where"])
        store.refresh()
        missing = store.missing()
        cost = sum(missing_tokens(row, own, missing) for row, own in zip(rows, keys, strict=True))
        live = sum(n * tree_tokens(row) for row, n in zip(source.rows, often, strict=True))
        live += evaluations(steps, cfg.train.eval_every) * sum(tree_tokens(row) for row in held_out)
        if cfg.reference.store == "on":
            use = True
        elif began:
            use = known is not None  # a run goes on as it began
        else:
            use = not model.frozen or cost < live  # without an adapter the alternative is a second model in memory
        how = found_in(store)
        spent = f"{cost:,} tokens to score now, {live:,} over the run without the store"
        print(f"{scorer}: {how if use else 'live'}; {spent}", file=sys.stderr)
    use, how = from_main((use, how), accelerator)
    if not use:
        return None, {}
    filler = AdapterOff(policy) if model.frozen and (cfg.reference.policy == "base" or not model.adapter) else AsLoaded(policy)
    of_tokens = (lambda micro: filler(micro, Asked(value=value))["value"]) if value else filler
    with one_filler(store, scorer, accelerator):
        how = found_in(store) if main else how  # others may have filled it meanwhile
        fill(store, rows, keys, level, of_tokens, source, accelerator, getattr(policy, "hooks", None))
    values: list[list[Any]] = []
    if main:
        found = store.found
        values = [[found[key] if level == "tokens" else float(found[key][0]) for key in row] for row in keys]
        store.touch()
        if cfg.reference.store_limit_gb is not None:
            evict(reference_root(), cfg.reference.store_limit_gb * 1e9, keep=store.used)
    values = from_main(values, accelerator)
    h = hashlib.sha256()
    for row, asked, scores in zip(every, rows, values, strict=True):
        others = [b.trained for tokens in row.extra for b in tokens.branches] if asked is not row else []
        blank = [np.zeros(n, np.float32) if level == "tokens" else 0.0 for n in others]
        row.stored[scorer] = [*scores, *blank]
        for score in scores:
            h.update(np.asarray(score, dtype=np.float32).tobytes())
    about = {name: {"identity": identity, "values_sha256": h.hexdigest()}}
    if main and known and known["values_sha256"] != h.hexdigest():
        print(f"{scorer}: its scores were computed anew since the run began; they may differ by rounding, and so may what follows",
              file=sys.stderr)
    return Stored(how), about


def found_in(store: Store) -> str:
    return f"stored ({len(store.wanted) - len(store.missing()):,} of {len(store.wanted):,} replies were there)"


@contextmanager
def one_filler(store: Store | None, scorer: str, accelerator: Accelerator) -> Iterator[None]:
    """Lets one run at a time fill a scorer's store. A run that had to wait finds there what the others have written."""
    needed, said = from_main(bool(store and store.missing()), accelerator), False
    # The other processes hear from the main one all along: one that waits too long for another gives up.
    while needed and not from_main(not store or store.alone(0.5 if not said else TURN), accelerator):
        if store and not said:
            print(f"{scorer}: another run fills the store; waiting for it", file=sys.stderr)
        said = True
    try:
        if store and needed:
            store.refresh()
        yield
    finally:
        if store and needed:
            store.release()


def fill(store: Store | None, rows: Sequence[Row], keys: Sequence[Sequence[bytes]], level: str, filler: Provider, source: OfflineSource,
         accelerator: Accelerator, hooks: Hooks | None = None) -> None:
    """Scores what the store lacks of `rows` (whose entries are called `keys`), chunk by chunk, one shard for each. `store` and `keys`
    are the main process's; the others follow it. `hooks`: those of a filler whose weights are split.

    Before each chunk the store is read again, and the chunks are taken in random order, so that runs share the work where a file system
    has no locks (see `one_filler`); a run that is killed leaves its finished chunks.
    """
    roomy = accelerator.device.type == "cuda"
    budget = source.budget * (ROOMIER if roomy else 1)
    left = _chunks(store, rows, keys, CHUNK * budget * accelerator.num_processes) if store else iter(())
    bar = tqdm(desc="reference", unit=" replies", total=len(store.missing()) if store else None, file=sys.stderr,
               disable=not store or not store.missing(), mininterval=0.1 if sys.stderr.isatty() else 5.0)
    with bar:
        while True:
            part = from_main(next(left, None), accelerator)
            if part is None:
                return
            with alone(hooks):
                scored = _score(part, rows, level, filler, replace(source, budget=budget, view="pairs", soft_labels=True), accelerator)
            everyone = gather_object(scored) if accelerator.num_processes > 1 else scored
            for row, _, values in everyone:
                if not np.isfinite(values).all():
                    raise RunFailed("the reference gives a reply a log-prob that is not finite (its prompt begins with the tokens "
                                    f"{rows[row].tokens.prompt[:8]}); its weights or its precision are at fault")
            if store:
                entries = {keys[row][number]: values for row, number, values in everyone}
                store.add(entries, {keys[row][number]: replies_of(rows[row])[number].trained for row, number, _ in everyone})
                bar.update(bar.total - len(store.missing()) - bar.n)


def _chunks(store: Store, rows: Sequence[Row], keys: Sequence[Sequence[bytes]], tokens: int) -> Iterator[list[tuple[int, list[int]]]]:
    """(row, numbers of its replies) that are still missing, in chunks of about so many tokens: rows of one length together, chunks in
    random order. Which rows make a chunk follows from what was missing at the start."""
    todo, planned = [], set()
    for number, row in enumerate(keys):
        if fresh := [i for i, key in enumerate(row) if key not in store.found and key not in planned]:
            todo.append((number, fresh))
            planned.update(row[i] for i in fresh)
    todo.sort(key=lambda item: (-tree_tokens(rows[item[0]]), item[0]))
    parts: list[list[tuple[int, list[int]]]] = []
    room = 0
    for item in todo:
        if room <= 0:
            parts.append([])
            room = tokens
        parts[-1].append(item)
        room -= tree_tokens(rows[item[0]])
    random.SystemRandom().shuffle(parts)
    for part in parts:
        store.refresh()
        still = [(row, [i for i in numbers if keys[row][i] not in store.found]) for row, numbers in part]
        if still := [(row, numbers) for row, numbers in still if numbers]:
            yield still


def _score(part: Sequence[tuple[int, list[int]]], rows: Sequence[Row], level: str, filler: Provider, source: OfflineSource,
           accelerator: Accelerator) -> list[tuple[int, int, np.ndarray]]:
    """This process's share of a chunk: (row, number of the reply, fp32 log-probs of its trained tokens or [1] for their sum)."""
    asked, of, out = [], [], []
    for row, numbers in part:
        every = rows[row].everything()
        for _, own in groupby(numbers, key=lambda i, every=every: every[i][0]):  # one prompt after the other
            of.append((row, list(own)))
            tokens = Tokens(every[of[-1][1][0]][0], [every[i][1] for i in of[-1][1]], frame=rows[row].tokens.frame)
            asked.append(Row(tokens, "pair"))
    for micro in replace(source, rows=asked).everything("pairs"):
        if not micro.rows:  # another process has one more
            continue
        micro = micro.to(accelerator.device)
        made = quantities(filler(micro), micro.layout)
        values = made["token_logp" if level == "tokens" else "logp"].float().cpu().numpy()
        lengths = micro.trained.sum(1).tolist() if level == "tokens" else [1] * len(micro.layout.lengths)
        edges = [(of[place][0], number) for place in micro.rows for number in of[place][1]]
        begin = 0
        for (row, number), length in zip(edges, lengths, strict=True):
            out.append((row, number, values[begin : begin + length].copy()))
            begin += length
    return out
