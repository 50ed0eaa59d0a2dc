"""What large runs hold and send by `prefopt plan`'s model, and that model against what DeepSpeed does: the tables of docs/scaling.md.

    python scripts/scale_tables.py      # some minutes on one core; no GPU, no network

Writes docs/scaling.json and what stands between its marks in docs/scaling.md.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from prefopt.config.schema import TrainConfig
from prefopt.launch import app
from prefopt.policies.flops import shape_of, tree_work
from prefopt.policies.known_configs import known_config, known_pipeline
from prefopt.training import memory, plan_pictures, rehearsal
from prefopt.training.plan import zero_settings
from prefopt.training.sharding import bandwidth, between_steps, layout_of, traffic

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROMPT, REPLY, PAIRS = 512, 512, 4  # tokens; a micro-batch of one GPU
DRAWS = 4  # pictures of one GPU's micro-batch: two pairs
GPUS, STAGES, PEAK, MFU = (8, 64, 512), (1, 2, 3), 989e12, 0.4
MODELS = {"Llama-3-8B": "llama3-8b", "Llama-3-70B": "llama3-70b", "SDXL": "sdxl", "FLUX.1-dev": "flux-dev"}
REHEARSED = [("llama3-8b", stage, world) for stage in (0, 1, 2, 3) for world in (2, 8, 512)]
REHEARSED += [(model, 3, 512) for model in ("llama3-8b adapter=lora", "sdxl", "flux-dev", "sdxl-lora")]
# A cut model is smaller than what DeepSpeed keeps gathered by default, and a large one is not.
TIGHT = {"zero_optimization": {"stage3_max_live_parameters": 40_000, "stage3_max_reuse_distance": 40_000, "reduce_bucket_size": 100_000,
                               "stage3_prefetch_bucket_size": 20_000, "stage3_param_persistence_threshold": 100}}


def composed(*words: str) -> TrainConfig:
    """The config of a command line."""
    found: list[TrainConfig] = []
    app.TASKS["plan"] = found.append
    app.run("plan", ["evaluation.kl=false", "evaluation.prompts=0", *words])
    return found[0]


def step_of(name: str, cfg: TrainConfig, lora: bool) -> tuple[memory.DryRun, float, float | None]:
    """(what a micro-batch takes, its FLOPs: forward, recomputed, backward; bytes of the largest part of a model that is loaded split)."""
    model = replace(cfg.model, gradient_checkpointing=True, lora=replace(cfg.model.lora, enabled=lora))
    if model.kind == "causal_lm":
        config, work = known_config(model.path), PAIRS * tree_work(PROMPT, [REPLY, REPLY], 2 * REPLY)
        run = memory.dry_run(config, model, "bf16", False, "sdpa", memory.Shape(1, int(work.tokens), int(work.scored), False), "cuda")
        shape = shape_of(config)
        return run, shape.step(work, lora) + shape.forward(work), memory.block_of(run, shape)
    folder = known_pipeline(model.path, model.max_sequence_length)
    counted = plan_pictures.counted(plan_pictures.meta_denoiser(folder, model.resolution), model.resolution)
    shape = plan_pictures.adapted(counted, model, folder)
    return plan_pictures.dry_run(folder, replace(cfg, model=model), DRAWS)[0], shape.step(DRAWS, lora) + shape.forward(DRAWS), None


def paper() -> list[dict[str, Any]]:
    """A row for each model, number of GPUs and stage."""
    out = []
    for name, word in MODELS.items():
        pictures = ["data=tiny-pictures"] if word in ("sdxl", "flux-dev") else []
        cfg = composed("algo=dpo", f"model={word}", "hardware=8xh100_zero3", *pictures)
        for lora in (False, True) if word != "sdxl" else (False,):
            run, flops, block = step_of(name, cfg, lora)
            for gpus in GPUS:
                for stage in STAGES if not lora else (3,):
                    hardware = replace(cfg.hardware, zero=stage, nodes=gpus // 8)
                    layout = layout_of(hardware, zero_settings(replace(cfg, hardware=hardware)))
                    needs = memory.memory(run, device="cuda", layout=layout, micros=1, frozen_copies=0, reloads=False, cache=0.0,
                                          runtime=memory.GPU_RUNTIME, block=block)
                    sent, (speed, where) = traffic(layout, run.weights, run.parameters, run.trainable, 1), bandwidth(hardware)
                    total = sum(sent.values())
                    other = needs.moments["an evaluation"] if stage == 3 else needs.peak
                    whole = needs.moments.get("the start and the end, with whole weights", other)
                    out.append({"model": name + (", LoRA" if lora else ""), "gpus": gpus, "stage": stage,
                                "step": max(needs.moments["a backward pass"], needs.moments["an update of the weights"]), "whole": whole,
                                "sent": total, "sending": total / speed, "link": where, "computing": flops / (PEAK * MFU)})
        print(f"{name}: planned", flush=True)
    return out


def checked(folder: Path) -> list[dict[str, Any]]:
    """Cut models in fake worlds: what was planned of them, what they held and sent."""
    tight, out = folder / "tight.json", []
    tight.write_text(json.dumps(TIGHT))
    for word, stage, world in REHEARSED:
        pictures = ["data=tiny-pictures"] if word.split("-")[0] in ("sdxl", "flux") else ["data.limit=64", "train.micro_batch_tokens=200"]
        words = ["algo=dpo", *f"model={word}".split(), "hardware=8xh100_zero3", f"hardware.zero={stage}", *pictures,
                 f"hardware.nodes={max(world // 8, 1)}", f"hardware.processes={min(world, 8)}"]
        cfg = composed(*words, *([f"hardware.deepspeed={tight}"] if stage == 3 else []))
        did, layout = rehearsal.rehearse(cfg), layout_of(cfg.hardware, zero_settings(cfg))
        planned = sum(traffic(layout, did.weights, did.parameters, did.trained, did.micros, did.passes).values())
        out.append({"model": f"{cfg.model.name}{', LoRA' if cfg.model.lora.enabled and 'lora' not in cfg.model.name else ''}",
                    "network": did.network, "parameters": did.parameters, "stage": stage, "world": world, "micros": did.micros,
                    "held": did.held, "held_planned": between_steps(layout, did.weights, did.parameters, did.trained),
                    "sent": sum(did.sent.values()), "sent_planned": planned})
        print(out[-1], flush=True)
    return out


def _paper_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | GPUs | ZeRO | a step holds | start, evaluations and end | sent | sending | computing |",
             "|---|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(
        f"| {r['model']} | {r['gpus']} | {r['stage']} | {_gb(r['step'])} | {_gb(r['whole'])} | {_gb(r['sent'])} | {r['sending']:.2f} s | "
        f"{r['computing']:.2f} s |" for r in rows)])


def _checked_table(rows: list[dict[str, Any]]) -> str:
    def pair(r: dict[str, Any], key: str) -> str:
        return f"{r[f'{key}_planned'] / 1e6:.2f} MB | {r[key] / 1e6:.2f} MB | {100 * (r[f'{key}_planned'] / r[key] - 1):+.1f} %"

    lines = ["| architecture of | weights | ZeRO | processes | held, planned | measured | error | sent, planned | measured | error |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(
        f"| {r['model']} | {r['parameters'] / 1e6:.2g} M | {r['stage'] or 'none'} | {r['world']} | {pair(r, 'held')} | {pair(r, 'sent')} |"
        for r in rows)])


def _gb(size: float) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e9:.1f} GB"


def write_between(page: Path, mark: str, text: str) -> None:
    """Puts `text` between the marks of this name."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    head, _, rest = page.read_text().partition(begin)
    page.write_text(f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out = {"torch": torch.__version__, "paper": paper(), "checked": checked(Path(folder))}
    (DOCS / "scaling.json").write_text(json.dumps(out, indent=1) + "\n")
    write_between(DOCS / "scaling.md", "paper", _paper_table(out["paper"]))
    write_between(DOCS / "scaling.md", "checked", _checked_table(out["checked"]))


if __name__ == "__main__":
    main()
