"""LoRA on diffusion networks: put on, saved and read as diffusers does, exported in the key styles of kohya's sd-scripts and of ComfyUI.

Styles of keys, by example of the query of a first attention layer:

    diffusers  unet.down_blocks.0.attentions.0...to_q.lora_A.weight, with the adapter's config in the file's metadata
    kohya      lora_unet_down_blocks_0_attentions_0...to_q.lora_down.weight and .alpha; SDXL, SD3 and FLUX by the names of the original
               code, in which (but for SDXL) query, key and value are one matrix
    comfyui    as kohya with diffusers' names (UNets); transformer.<name>.lora_A.weight (transformers)

Exports have alpha / rank multiplied into the second matrix, so that alpha = rank and no reader can scale them otherwise.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prefopt.config.schema import LoraConfig
from prefopt.errors import UserError

if TYPE_CHECKING:
    from prefopt.policies.denoisers import Denoiser

STYLES = ("diffusers", "kohya", "comfyui")
NAME = "pytorch_lora_weights.safetensors"  # diffusers' own
PEFT_NAME = "adapter_model.safetensors"  # PEFT's own, for networks that diffusers loads no LoRA into


def add_lora(denoiser: Denoiser, lora: LoraConfig, seed: int) -> None:
    """Freezes the network and puts an adapter in fp32 on it: that of `lora.adapter`, or a fresh one, which changes nothing yet."""
    from peft import LoraConfig as PeftLora
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    network = denoiser.network.requires_grad_(False)
    if lora.adapter:
        _load(denoiser, Path(lora.adapter).expanduser(), lora.dropout)
    else:
        wanted = _targets(denoiser, lora.targets)
        config = PeftLora(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=wanted)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(config, network)
            except ValueError as error:
                raise UserError(f"model.lora.targets={lora.targets}: {str(error).splitlines()[0][:200]}") from error
    for module in network.modules():
        if isinstance(module, LoraLayer):  # not every file of an adapter can say how much dropout it is to have
            module.lora_dropout["default"] = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
    denoiser.lora = lora
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if lora.adapter:  # it was put on in the network's own type, which may be bf16 and have rounded it
        restore_lora(denoiser, Path(lora.adapter).expanduser())


def _targets(denoiser: Denoiser, targets: str) -> list[str]:
    """Names of modules: those that are given, the attention projections of the family, or every linear layer."""
    if targets == "all-linear":
        return [name for name, module in denoiser.network.named_modules() if isinstance(module, nn.Linear)]
    return [t.strip() for t in (denoiser.attention if targets == "attention" else targets).split(",")]


def save_lora(denoiser: Denoiser, folder: Path) -> None:
    """What `pipe.load_lora_weights(folder)` reads. Of PixArt, for which diffusers has no such function, an adapter folder of PEFT:
    `PeftModel.from_pretrained(pipe.transformer, folder)`."""
    from peft import get_peft_model_state_dict

    config, part = denoiser.network.peft_config["default"], denoiser.folder.network
    weights = get_peft_model_state_dict(denoiser.network, adapter_name="default")
    state = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    if hasattr(denoiser.pipeline, "save_lora_weights"):
        about = json.loads(json.dumps(config.to_dict(), default=sorted))  # sets as lists
        denoiser.pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": about})
        return
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{name}": value for name, value in state.items()}, folder / PEFT_NAME, metadata={"format": "pt"})
    config.save_pretrained(folder)


def restore_lora(denoiser: Denoiser, folder: Path) -> None:
    """Puts saved weights into the adapter that is there."""
    from peft import set_peft_model_state_dict

    state, _, _ = _read(denoiser, folder)
    _check(denoiser, state, folder)
    own = {n for n, _ in denoiser.network.named_parameters() if "lora_" in n}
    if {re.sub(r"\.weight$", ".default.weight", name) for name in state} != own:
        raise UserError(f"{folder} holds a LoRA of other layers than this run's; set model.lora.targets to those it was trained with")
    try:
        set_peft_model_state_dict(denoiser.network, state, "default")
    except RuntimeError as error:
        raise UserError(f"{folder} holds a LoRA of another rank than model.lora.r={denoiser.network.peft_config['default'].r}") from error


def _load(denoiser: Denoiser, path: Path, dropout: float) -> None:
    """Puts the adapter in `path` (a file, or a folder that holds one) on the network."""
    from peft import LoraConfig as PeftLora
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    state, alphas, about = _read(denoiser, path)
    _check(denoiser, state, path)
    network, part = denoiser.network, denoiser.folder.network
    try:
        if hasattr(network, "load_lora_adapter"):
            about = about and {f"{part}.{name}": value for name, value in (about | {"lora_dropout": dropout}).items()}
            prefixed = {f"{part}.{name}": value for name, value in state.items()}
            network.load_lora_adapter(prefixed, prefix=part, network_alphas=alphas or None, metadata=about, adapter_name="default")
        else:
            rank = next(value.shape[0] for name, value in state.items() if name.endswith("lora_A.weight"))
            kept = {name: value for name, value in (about or {}).items()
                    if name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")}
            targets = sorted({name.rsplit(".lora_", 1)[0] for name in state})
            config = PeftLora(**({"r": rank, "lora_alpha": rank} | kept), lora_dropout=dropout, target_modules=targets)
            inject_adapter_in_model(config, network)
            set_peft_model_state_dict(network, state, "default")
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"model.lora.adapter={path} does not load ({type(error).__name__}: {str(error).splitlines()[0][:200]})") from error


def _read(denoiser: Denoiser, path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]:
    """(weights by PEFT's names within the network, alphas, config) of a LoRA in any style that diffusers reads."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    file = _file(path)
    try:
        raw = load_file(file)
        with safe_open(file, "pt") as opened:
            said = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "null"))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error})") from error
    part, alphas = denoiser.folder.network, {}
    if any(name.startswith("base_model.model.") for name in raw):  # PEFT's own style
        about = file.with_name("adapter_config.json")
        said = json.loads(about.read_text()) if about.is_file() else None
        state = {name.removeprefix("base_model.model."): value for name, value in raw.items()}
        return state, {}, said
    if hasattr(denoiser.pipeline, "lora_state_dict"):
        takes = {"unet_config": denoiser.network.config} if part == "unet" else {}
        takes |= {"return_alphas": True} if denoiser.folder.pipeline == "FluxPipeline" else {}
        try:
            found = denoiser.pipeline.lora_state_dict(dict(raw), return_lora_metadata=True, **takes)
        except Exception as error:  # keys that no style of this family has
            raise _another(denoiser, path, next(iter(raw), "nothing")) from error
        raw, alphas = found[0], (found[1] if len(found) == 3 else None) or {}
    about = {name.removeprefix(f"{part}."): value for name, value in said.items() if name.startswith(f"{part}.")} if said else None
    if text := [name for name in raw if name.startswith(("text_encoder", "lora_te"))]:
        raise UserError(f"{path} also changes the text encoder ({text[0]}), which prefopt does not train; take a LoRA of the {part} alone")
    if other := [name for name in raw if not name.startswith(f"{part}.")]:
        raise _another(denoiser, path, other[0])
    state = {name.removeprefix(f"{part}."): value for name, value in raw.items()}
    if state and "lora_A" not in next(iter(state)):
        state = convert_unet_state_dict_to_peft(state)
    return state, alphas, about


def _file(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is not a safetensors file; prefopt loads no pickles")
        return path
    found = [path / name for name in (NAME, PEFT_NAME) if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if not found:
        raise UserError(f"{path} holds no LoRA weights ({NAME})")
    return found[0]


def _check(denoiser: Denoiser, state: dict[str, Tensor], path: Path) -> None:
    """Every matrix of a LoRA belongs to a layer of the network, and fits it."""
    if not state:
        raise UserError(f"{path} holds no LoRA weights")
    layers = {name.replace(".base_layer", ""): module for name, module in denoiser.network.named_modules() if hasattr(module, "weight")}
    for name, value in state.items():
        layer, _, which = name.rpartition(".lora_")
        weight = getattr(layers.get(layer), "weight", None)
        if weight is None or which not in ("A.weight", "B.weight") or value.shape[which[0] == "A"] != weight.shape[which[0] == "A"]:
            raise _another(denoiser, path, name)


def _another(denoiser: Denoiser, path: Path, name: str) -> UserError:
    return UserError(f"{path} holds a LoRA of another architecture: its {name} fits no layer of {denoiser.folder.path} ({denoiser.family})")


# ---- export ------------------------------------------------------------------------------------------


def export_lora(denoiser: Denoiser, file: str | Path, style: str) -> None:
    """Writes the adapter as one safetensors file whose keys are in a style of `STYLES`. UserError where a style has no name for a layer."""
    from safetensors.torch import save_file

    if style not in STYLES:
        raise UserError(f"LoRA weights are exported as {', '.join(STYLES)}, not {style}")
    if denoiser.lora is None:
        raise UserError("the model has no LoRA weights to export; it was trained in full, and its folder is what other programs load")
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    pairs = {name: (down.contiguous(), up.contiguous()) for name, (down, up) in matrices(denoiser.network).items()}
    save_file(_renamed(denoiser, pairs, style), file, metadata={"format": "pt"})


def matrices(network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """(A [r, in], B [out, r]) of each layer with an adapter; what it adds to the layer's weight is B A, its scale included."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            down, up = module.lora_A["default"].weight.detach().cpu(), module.lora_B["default"].weight.detach().cpu()
            found[name] = (down.clone(), up * module.scaling["default"])
    return found


def _renamed(denoiser: Denoiser, pairs: dict[str, tuple[Tensor, Tensor]], style: str) -> dict[str, Tensor]:
    from diffusers.utils import convert_state_dict_to_kohya

    part, family = denoiser.folder.network, denoiser.family
    def keyed(names: dict[str, str]) -> dict[str, Tensor]:
        return {f"{part}.{names[n]}.lora_{which}.weight": w for n, both in pairs.items() for which, w in zip("AB", both, strict=True)}

    if style == "diffusers" or (style == "comfyui" and part == "transformer" and family != "sana"):
        return keyed({name: name for name in pairs})
    if family in ("sana", "pixart"):
        raise UserError(f"{style} has no LoRA keys for {family}; export it as diffusers")
    if part == "unet":
        names = {name: _original_unet(name, denoiser) if style == "kohya" and family == "sdxl" else name for name in pairs}
        return convert_state_dict_to_kohya(keyed(names))
    made: dict[str, Tensor] = {}
    for name, members in _fused(denoiser, pairs).items():
        down, up = _one(members, pairs)
        key = "lora_unet_" + name.replace(".", "_")
        made |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(len(down)))}
    return made


def _original_unet(name: str, denoiser: Denoiser) -> str:
    """SDXL's own name of a layer in an attention block: its blocks are numbered through, down and up."""
    per = denoiser.network.config.layers_per_block + 1
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)|mid_block\.attentions\.0\.(.+)", name)
    if not found:
        raise UserError(f"kohya's keys for SDXL are known for attention blocks only, not for {name}; export it as comfyui or diffusers")
    way, block, layer, rest, middle = found.groups()
    if middle:
        return f"middle_block.1.{middle}"
    number = int(block) * per + int(layer)
    return f"input_blocks.{number + 1}.1.{rest}" if way == "down" else f"output_blocks.{number}.1.{rest}"


# (name in diffusers within a block, name in the original code, place among those that are one matrix there)
SD3_NAMES = [
    *((f"attn.to_{which}", "x_block.attn.qkv", place) for place, which in enumerate("qkv")),
    *((f"attn2.to_{which}", "x_block.attn2.qkv", place) for place, which in enumerate("qkv")),
    *((f"attn.add_{which}_proj", "context_block.attn.qkv", place) for place, which in enumerate("qkv")),
    ("attn.to_out.0", "x_block.attn.proj", 0), ("attn2.to_out.0", "x_block.attn2.proj", 0),
    ("attn.to_add_out", "context_block.attn.proj", 0),
    ("ff.net.0.proj", "x_block.mlp.fc1", 0), ("ff.net.2", "x_block.mlp.fc2", 0),
    ("ff_context.net.0.proj", "context_block.mlp.fc1", 0), ("ff_context.net.2", "context_block.mlp.fc2", 0),
    ("norm1.linear", "x_block.adaLN_modulation.1", 0),
]
FLUX_NAMES = [
    *((f"attn.to_{which}", "img_attn.qkv", place) for place, which in enumerate("qkv")),
    *((f"attn.add_{which}_proj", "txt_attn.qkv", place) for place, which in enumerate("qkv")),
    ("attn.to_out.0", "img_attn.proj", 0), ("attn.to_add_out", "txt_attn.proj", 0),
    ("ff.net.0.proj", "img_mlp.0", 0), ("ff.net.2", "img_mlp.2", 0),
    ("ff_context.net.0.proj", "txt_mlp.0", 0), ("ff_context.net.2", "txt_mlp.2", 0),
    ("norm1.linear", "img_mod.lin", 0), ("norm1_context.linear", "txt_mod.lin", 0),
]
FLUX_SINGLE_NAMES = [
    *((f"attn.to_{which}", "linear1", place) for place, which in enumerate("qkv")), ("proj_mlp", "linear1", 3),
    ("proj_out", "linear2", 0), ("norm.linear", "modulation.lin", 0),
]
BLOCKS = {
    ("sd3", "transformer_blocks"): ("joint_blocks", SD3_NAMES),
    ("flux", "transformer_blocks"): ("double_blocks", FLUX_NAMES),
    ("flux", "single_transformer_blocks"): ("single_blocks", FLUX_SINGLE_NAMES),
}


def _fused(denoiser: Denoiser, pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, list[tuple[str, int]]]:
    """For each matrix of the original code the layers of diffusers that are its rows, in order, with how many rows they are: also those
    without an adapter."""
    network, made = denoiser.network, {}
    for name in pairs:
        blocks, number, inner = (name.split(".", 2) + ["", ""])[:3]
        theirs, names = BLOCKS.get((denoiser.family, blocks), ("", []))
        found = next((original for own, original, _ in names if own == inner), None)
        if found is None:
            raise UserError(f"kohya has no key for {name}; export it as comfyui or diffusers")
        members = [f"{blocks}.{number}.{own}" for own, original, _ in sorted(names, key=lambda n: n[2]) if original == found]
        made[f"{theirs}.{number}.{found}"] = [(m, network.get_submodule(m).weight.shape[0]) for m in members]
    return made


def _one(members: list[tuple[str, int]], pairs: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The adapters of layers stacked into one: their first matrices above each other, their second ones block by block."""
    if len(members) == 1:
        return pairs[members[0][0]]
    have = [(name, *pairs[name]) for name, _ in members if name in pairs]
    down = torch.cat([a for _, a, _ in have])
    up, row, column = torch.zeros(sum(rows for _, rows in members), len(down)), 0, 0
    for name, rows in members:
        if name in pairs:
            b = pairs[name][1]
            up[row : row + rows, column : column + b.shape[1]] = b
            column += b.shape[1]
        row += rows
    return down, up
