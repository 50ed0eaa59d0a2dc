"""`prefopt export`: what a run has trained, for other programs: a plain model folder (`export_model.py`), or the LoRA of a run on pictures
as one file, in the keys that another program reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from prefopt.errors import UserError, nearest
from prefopt.evaluation.export_model import export_model, push
from prefopt.evaluation.merge import model_folder
from prefopt.policies.denoisers import open_denoiser
from prefopt.policies.lora_export import STYLES, export_lora
from prefopt.policies.pipeline import locate_pipeline
from prefopt.training.rundir import load_run_config

USAGE = "prefopt export RUN style=model output=FOLDER, or style=comfyui output=FILE.safetensors"
OF_MODELS = {"checkpoint": "last", "dtype": "fp32", "push": "", "private": "true"}  # options of style=model, and what they are without


def main(words: Sequence[str]) -> None:
    """`prefopt export RUN style=model output=FOLDER`, or `style=diffusers|kohya|comfyui output=FILE.safetensors`."""
    options, runs = {"style": "", "output": "", **OF_MODELS}, []
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
    for key in ("style", "output"):
        if not options[key]:
            raise UserError(f"prefopt export needs {key}=...; {USAGE}")
    if options["style"] == "model":
        _model(runs[0], options)
        return
    for key, usual in OF_MODELS.items():
        if options[key] != usual:
            raise UserError(f"{key}={options[key]} is for style=model, and style={options['style']} writes the LoRA of model/ as it is")
    export(runs[0], options["style"], Path(options["output"]).expanduser())
    print(f"LoRA weights for {options['style']}: {options['output']}")


def _model(run: str, options: dict[str, str]) -> None:
    output = Path(options["output"]).expanduser()
    if options["private"] not in ("true", "false"):
        raise UserError(f"private={options['private']} is none of true, false")
    step = export_model(run, output, options["checkpoint"], options["dtype"])
    print(f"model of step {step}: {output}")
    if options["push"]:
        print(f"pushed: {push(output, options['push'], options['private'] == 'true')}")


def export(run: str, style: str, output: Path) -> None:
    """Writes the adapter that the finished `run` has trained into the file `output`, in a style of `STYLES`. Raises `UserError`."""
    if style not in STYLES:
        raise UserError(f"style={style} is none of {', '.join(('model', *STYLES))}{nearest(style, ('model', *STYLES))}")
    if output.suffix != ".safetensors" or output.exists():
        said = "exists already; choose another name" if output.exists() else "is no safetensors file; give its name that ending"
        raise UserError(f"output={output} {said}")
    model = load_run_config(Path(run)).model
    if model.kind != "diffusion" or not model.lora.enabled:
        what = "is no diffusion model" if model.kind != "diffusion" else "was trained without a LoRA adapter"
        raise UserError(f"{run} {what}, and style={style} is for the LoRA of one; style=model writes what any run has trained")
    adapter = replace(model.lora, adapter=str(model_folder(run)))
    # Only the adapter is written, so the network may be as small in memory as it gets.
    denoiser = open_denoiser(locate_pipeline(model).folder, torch.bfloat16, torch.device("cpu"), adapter)
    export_lora(denoiser, output, style)
