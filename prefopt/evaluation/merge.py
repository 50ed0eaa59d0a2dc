"""`prefopt merge`: the weights of several finished runs, added up with coefficients, as one model (COFS-DPO, arXiv 2406.05534)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prefopt.errors import UserError, nearest
from prefopt.policies.arithmetic import combine, combine_adapters, lora_matrix
from prefopt.training.checkpoint import naming

ADAPTER = "adapter_config.json"
USAGE = "prefopt merge RUN RUN... weights=[0.5,0.5] output=FOLDER"


def main(words: Sequence[str]) -> None:
    """`prefopt merge RUN... weights=[...] output=FOLDER`."""
    options = {"weights": "", "output": ""}
    runs = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or Path(word).exists():
            runs.append(word)
        elif key not in options:
            raise UserError(f"prefopt merge has no option {key}{nearest(key, options)}; {USAGE}")
        else:
            options[key] = value
    for key, value in options.items():
        if not value:
            raise UserError(f"prefopt merge needs {key}=...; {USAGE}")
    merge(runs, coefficients_of(options["weights"], len(runs)), Path(options["output"]))
    print(f"merged model: {options['output']}")


def coefficients_of(text: str, runs: int) -> list[float]:
    """The numbers in `[0.5,0.5]`, one for each run."""
    try:
        numbers = [float(part) for part in text.strip("[] ").split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"weights={text}: it is a list of numbers, one for each run, as in weights=[0.5,0.5]")
    if len(numbers) != runs:
        raise UserError(f"weights={text} has {len(numbers)} numbers for {runs} runs; give one for each, in their order")
    return numbers


def merge(runs: Sequence[str], coefficients: Sequence[float], output: Path) -> None:
    """Writes the model whose weights are sum_k coefficients[k] * weights of runs[k] into the new folder `output`.

    Full models and tables are added up tensor by tensor, in float64; their coefficients must add up to 1. LoRA adapters are put side by
    side, so that the change that they make to their common base model is the sum of their changes; the rank is the sum of their ranks.
    One run with the coefficient 1 beside others with 0 is copied as it is.
    """
    models = [model_folder(run) for run in runs]
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise UserError(f"output={output} exists already; choose a folder that does not")
    used = [k for k, c in enumerate(coefficients) if c != 0]
    if not used:
        raise UserError("all weights are 0, so nothing would be left; give at least one run a share")
    adapters = [(model / ADAPTER).is_file() for model in models]
    if len(set(adapters)) > 1:
        lone, whole = runs[adapters.index(True)], runs[adapters.index(False)]
        raise UserError(f"{lone} is a LoRA adapter and {whole} a whole model; merge runs of one kind")
    if not adapters[0] and not math.isclose(math.fsum(coefficients), 1, abs_tol=1e-9):
        raise UserError(f"the weights add up to {math.fsum(coefficients):g}; for whole models they must add up to 1, or what all share "
                        "would be scaled")
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        alone = [coefficients[k] for k in used] == [1]
        shutil.copytree(models[used[0]], part, ignore=None if alone else shutil.ignore_patterns("*.safetensors"))
        if not alone:
            (_merge_adapters if adapters[0] else _merge_models)(models, coefficients, part)
        (part / "merge.json").write_text(json.dumps({"runs": list(runs), "weights": list(coefficients)}, indent=2))
        if output.is_dir():
            output.rmdir()
        part.rename(output)
    except ValueError as error:
        raise UserError(f"the weights of these runs cannot be added up: {error}; they must be of one model") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def model_folder(run: str) -> Path:
    """The model folder of a finished run, or the folder itself if it is one."""
    folder = Path(run).expanduser()
    for candidate in (folder / "model", folder):
        if any(candidate.glob("*.safetensors")):
            return candidate
    raise UserError(f"{run} has no trained model; name the folder of a finished run (its subfolder model/ holds the weights)")


def _merge_models(models: Sequence[Path], coefficients: Sequence[float], target: Path) -> None:
    files = sorted(path.name for path in models[0].glob("*.safetensors"))
    for model in models[1:]:
        if different := sorted(set(files) ^ {path.name for path in model.glob("*.safetensors")}):
            raise ValueError(f"{different[0]} is not in all of their folders")
    for name in files:
        with safe_open(models[0] / name, framework="pt") as first:
            about = first.metadata()
        with naming(target / name):
            save_file(combine([load_file(model / name) for model in models], coefficients), target / name, metadata=about)


def _merge_adapters(models: Sequence[Path], coefficients: Sequence[float], target: Path) -> None:
    abouts = [json.loads((model / ADAPTER).read_text(encoding="utf-8")) for model in models]
    for model, about in zip(models, abouts, strict=True):
        if about.get("use_dora") or about.get("rank_pattern") or about.get("alpha_pattern"):
            raise UserError(f"{model}: adapters with DoRA, or with a rank or an alpha of their own for some layers, are not merged")
        if about.get("base_model_name_or_path") != abouts[0].get("base_model_name_or_path"):
            raise UserError(f"{model} is an adapter of {about.get('base_model_name_or_path')}, and {models[0]} of "
                            f"{abouts[0].get('base_model_name_or_path')}; merge adapters of one base model")
    states = [load_file(model / "adapter_model.safetensors") for model in models]
    whole = [name for name in states[0] if not lora_matrix(name)]
    if whole and not math.isclose(math.fsum(coefficients), 1, abs_tol=1e-9):
        raise UserError(f"{models[0]} holds {whole[0]}, which was trained whole beside its LoRA matrices (modules_to_save), and the "
                        f"weights add up to {math.fsum(coefficients):g}; with such layers they must add up to 1, or these would be scaled")
    merged = combine_adapters(states, [_scale(about) for about in abouts], coefficients)
    rank = sum(about["r"] for about, c in zip(abouts, coefficients, strict=True) if c != 0)
    with naming(target / "adapter_model.safetensors"):
        save_file(merged, target / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {**abouts[0], "r": rank, "lora_alpha": rank, "use_rslora": False}
    (target / ADAPTER).write_text(json.dumps(settings, indent=2))


def _scale(about: dict[str, Any]) -> float:
    """What PEFT multiplies B A by."""
    return about["lora_alpha"] / (math.sqrt(about["r"]) if about.get("use_rslora") else about["r"])
