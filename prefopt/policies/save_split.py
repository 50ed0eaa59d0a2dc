"""Writes a transformers model whose weights are split over processes, without ever holding more of it than one file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from prefopt.policies.split import Hooks, pieces

SHARD = 5_000_000_000  # bytes of a file, and of what one process holds of the model in CPU memory


def save_split(model: Any, folder: Path, hooks: Hooks) -> None:
    """What `model.save_pretrained(folder)` writes. For one process; the others wait in `split.alone`."""
    if hasattr(model, "peft_config"):  # the adapter alone
        trained = {name: tensor for piece in pieces(model, hooks, trained=True) for name, tensor in piece.items()}
        model.save_pretrained(folder, selected_adapters=["default"], state_dict=trained, save_embedding_layers=False)
        return
    from transformers.core_model_loading import revert_weight_conversion  # experts, say, have other names and shapes in files

    model.save_pretrained(folder, state_dict={})  # configs, and the code of models that bring their own
    (folder / "model.safetensors").unlink(missing_ok=True)
    for old in folder.glob("model-*.safetensors"):
        old.unlink()
    ignored = set(model._keys_to_ignore_on_save or ())
    kept = ({n: t for n, t in piece.items() if n not in ignored} for piece in pieces(model, hooks))
    parts, where, size = [], {}, 0
    for shard in shards(revert_weight_conversion(model, piece) for piece in kept):
        parts.append(folder / f"model-{len(parts) + 1:05d}.safetensors")
        save_file(shard, parts[-1], metadata={"format": "pt"})
        where |= dict.fromkeys(shard, len(parts))
        size += sum(map(_bytes, shard.values()))
    names = ["model.safetensors"] if len(parts) == 1 else [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        part.rename(folder / name)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if len(parts) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": {name: names[i - 1] for name, i in where.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def shards(found: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors of all of `found`, in the same order, in dicts of at most SHARD bytes (or of one tensor that is larger)."""
    shard: dict[str, Tensor] = {}
    held = 0
    for piece in found:
        for name, tensor in piece.items():
            if shard and held + _bytes(tensor) > SHARD:
                yield shard
                shard, held = {}, 0
            shard[name] = tensor
            held += _bytes(tensor)
    if shard:
        yield shard


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
