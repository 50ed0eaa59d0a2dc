"""`prefopt export`: the LoRA of a finished run on pictures as one file, in the keys that another program reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from prefopt.errors import UserError, nearest
from prefopt.evaluation.merge import model_folder
from prefopt.policies.denoisers import open_denoiser
from prefopt.policies.lora_export import STYLES, export_lora
from prefopt.policies.pipeline import locate_pipeline
from prefopt.training.rundir import load_run_config

USAGE = "prefopt export RUN style=comfyui output=FILE.safetensors"


def main(words: Sequence[str]) -> None:
    """`prefopt export RUN style=diffusers|kohya|comfyui output=FILE.safetensors`."""
    options, runs = {"style": "", "output": ""}, []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or Path(word).exists():
            runs.append(word)
        elif key not in options:
            raise UserError(f"prefopt export has no option {key}{nearest(key, options)}; {USAGE}")
        else:
            options[key] = value
    if len(runs) != 1:
        raise UserError(f"prefopt export takes one run, not {len(runs)}; {USAGE}")
    for key, value in options.items():
        if not value:
            raise UserError(f"prefopt export needs {key}=...; {USAGE}")
    export(runs[0], options["style"], Path(options["output"]).expanduser())
    print(f"LoRA weights for {options['style']}: {options['output']}")


def export(run: str, style: str, output: Path) -> None:
    """Writes the adapter that the finished `run` has trained into the file `output`, in a style of `STYLES`. Raises `UserError`."""
    if style not in STYLES:
        raise UserError(f"style={style} is none of {', '.join(STYLES)}{nearest(style, STYLES)}")
    if output.suffix != ".safetensors" or output.exists():
        said = "exists already; choose another name" if output.exists() else "is no safetensors file; give its name that ending"
        raise UserError(f"output={output} {said}")
    model = load_run_config(Path(run)).model
    if model.kind != "diffusion" or not model.lora.enabled:
        what = "is no diffusion model" if model.kind != "diffusion" else "was trained without a LoRA adapter"
        raise UserError(f"{run} {what}, and prefopt export is for the LoRA of one; other programs load its folder model/ as it is")
    adapter = replace(model.lora, adapter=str(model_folder(run)))
    # Only the adapter is written, so the network may be as small in memory as it gets.
    denoiser = open_denoiser(locate_pipeline(model).folder, torch.bfloat16, torch.device("cpu"), adapter)
    export_lora(denoiser, output, style)
