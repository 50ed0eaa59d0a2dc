"""`prefopt export RUN style=model`: what a run has trained as a plain folder of transformers or diffusers, with a model card.

LoRA is merged: base + B A alpha / r, added up in fp32. The folder loads without prefopt and without PEFT.
"""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from prefopt import __version__
from prefopt.config.catalogue import algo_info
from prefopt.config.docstring import doc_parts
from prefopt.config.schema import TrainConfig
from prefopt.errors import UserError
from prefopt.policies.load import load_policy
from prefopt.policies.owned import PREFIX
from prefopt.policies.start import started
from prefopt.tracking.redact import redact
from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from prefopt.training.rundir import load_run_config, plain_config, read_manifest

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_model(run: str, output: Path, which: str = "last", dtype: str = "fp32") -> int:
    """Writes the policy of checkpoint `which` (last, best, or a step) of `run` into the new folder `output`; returns its step. Raises
    `UserError`."""
    if dtype not in TYPES:
        raise UserError(f"dtype={dtype} is none of {', '.join(TYPES)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={output} exists already; choose a folder that does not")
    folder = Path(run).expanduser()
    cfg = load_run_config(folder)
    if cfg.model.kind == "tabular":
        raise UserError(f"{run} trained model={cfg.model.name}, a table that no other program reads; its numbers are in {folder}/model")
    if cfg.model.user_width is not None:
        raise UserError(f"{run} trained an attention to users (adapter=user), which no plain pipeline has; prefopt sample draws from it")
    path, state = _checkpoint(folder, which)
    policy = _policy(cfg, path)
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        if cfg.model.kind == "diffusion":
            denoiser = policy.denoiser
            if denoiser.lora is not None:
                _merge(denoiser.network)
                denoiser.lora = None
            denoiser.network.to(TYPES[dtype])
            denoiser.save(part, complete=True)
        else:
            if cfg.model.lora.enabled:
                policy.model = policy.model.merge_and_unload()
                policy.cfg = replace(policy.cfg, lora=replace(policy.cfg.lora, enabled=False))
            policy.model.to(TYPES[dtype])
            policy.save(part)
        (part / "README.md").write_text(card(cfg, folder, state["step"]), encoding="utf-8")
        if output.is_dir():
            output.rmdir()
        part.rename(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return state["step"]


def _checkpoint(folder: Path, which: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a checkpoint whose files are as they were written, and its totals."""
    known = checkpoint.steps(folder / "checkpoints")
    if not known:
        raise UserError(f"{folder} has no checkpoint yet; train it first (the command is in its manifest.json)")
    read = {path: json.loads((path / "state.json").read_text(encoding="utf-8")) for path in known}
    path, wanted = known[-1], which
    if which == "best":
        best = read[known[-1]].get("best")
        if not best:
            raise UserError(f"{folder} was trained without train.keep_best, so no checkpoint is known to be the best; give checkpoint=STEP")
        wanted = str(best["step"])
    if wanted != "last":
        path = folder / "checkpoints" / f"step-{int(wanted) if wanted.isdigit() else -1:06d}"
        if path not in known:
            raise UserError(f"checkpoint={which}: {folder} keeps those of the steps {', '.join(str(read[p]['step']) for p in known)}")
    if wrong := checkpoint.problem(path):
        raise UserError(f"the checkpoint {path} is damaged ({wrong}); choose another with checkpoint=STEP")
    return path, read[path]


def _policy(cfg: TrainConfig, path: Path) -> nn.Module:
    """The policy of a run, in fp32 on the CPU, with the weights of a checkpoint (their moving average under train.ema)."""
    quantity = "reward" if "reward" in algo_info(cfg.algo["name"], cfg.trust.packages).quantities["policy"] else "token_logp"
    model = replace(started(cfg.model), quantize=None, compile=False, attention="auto")
    policy = load_policy(model, cfg.data, cfg.trust, torch.device("cpu"), "fp32", cfg.seed, quantity, cfg.noise)
    weights = load_file(path / ("ema.safetensors" if (path / "ema.safetensors").exists() else "weights.safetensors"))
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(PREFIX)}
    parameters = policy.trainable()
    if set(weights) != set(parameters):
        raise UserError(f"{path} holds other weights than {policy.source['where']} has; the model of the run has changed")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return policy


def _merge(network: nn.Module) -> None:
    """Adds each LoRA matrix to its layer and takes the adapter off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [(n, m) for n, m in network.named_modules() if isinstance(m, BaseTunerLayer)]:
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, layer.get_base_layer())
    for left in ("peft_config", "_hf_peft_config_loaded"):
        vars(network).pop(left, None)


def card(cfg: TrainConfig, folder: Path, step: int) -> str:
    """A model card in Markdown: algorithm, data, figures, config."""
    info, manifest = algo_info(cfg.algo["name"], cfg.trust.packages), read_manifest(folder)
    equations, _, _ = doc_parts(info.doc)
    library = "diffusers" if cfg.model.kind == "diffusion" else "transformers"
    about = {"library_name": library, "tags": ["prefopt", "preference-optimization", cfg.algo["name"]]}
    if cfg.model.path and not Path(cfg.model.path).expanduser().exists():
        about["base_model"] = cfg.model.path
    if cfg.data.source == "hub" and cfg.data.path:
        about["datasets"] = [cfg.data.path]
    rows = [r for r in read_jsonl(folder / "metrics.jsonl") if r.get("split") == "eval"]
    first, last = (next((r for r in rows if r["step"] == s), {}) for s in (0, step))
    figures = [f"| {name} | {_figure(first, name)} | {_figure(last, name)} |" for name in sorted(last)
               if isinstance(last[name], (int, float)) and name not in ("step", "seconds") and not name.endswith(("_low", "_high"))]
    data = manifest.get("data", {}).get("train", {})
    config = yaml.safe_dump(redact(plain_config(cfg, cfg.algo["name"])), sort_keys=False, allow_unicode=True)
    lines = [
        "---", yaml.safe_dump(about, sort_keys=False).strip(), "---", "",
        f"# {cfg.model.name}, trained with {cfg.algo['name']}", "",
        f"Made by prefopt {__version__} from {cfg.model.path or cfg.model.name}, after optimiser step {step}.", "",
        "## Algorithm", "", f"{info.name}: {info.doc.strip().splitlines()[0]}", "",
        *(["```", *(line for equation in equations for line in equation.splitlines()), "```", ""] if equations else []),
        "## Data", "", f"{cfg.data.name}" + (f", {data['rows']:,} training rows" if isinstance(data.get("rows"), int) else "")
        + (f", revision {data['revision']}" if data.get("revision") else "") + ".", "",
    ]
    if figures:
        lines += ["## Figures on held-out data", "", "With 95 % intervals where they were measured.", "",
                  "| measure | before | after |", "|---|---|---|", *figures, ""]
    command = manifest.get("command")
    lines += ["## Config", "", *(["```", command if isinstance(command, str) else shlex.join(command), "```", ""] if command else []),
              "```yaml", config.rstrip(), "```", ""]
    return str(redact("\n".join(lines)))


def _figure(row: dict[str, Any], name: str) -> str:
    if not isinstance(row.get(name), (int, float)):
        return ""
    interval = f" ({row[f'{name}_low']:.4g} to {row[f'{name}_high']:.4g})" if f"{name}_low" in row else ""
    return f"{row[name]:.4g}{interval}"


def push(folder: Path, name: str, private: bool) -> str:
    """Uploads an exported folder to the Hugging Face hub as `name`; returns its address. Raises `UserError`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Model exported by prefopt")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        said = " ".join(str(redact(str(error))).split())[:300]
        raise UserError(f"push={name}: the hub refused it ({said}); the folder {folder} is complete. Log in with `hf auth login`, or set "
                        "HF_TOKEN to a token that may write there") from error
    return str(address)
