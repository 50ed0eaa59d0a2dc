"""torch.compile for the layers of a decoder, one by one: layers of a kind share one program, so 30 layers compile as fast as one."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from prefopt.errors import UserError


def compile_layers(decoder: nn.Module, device: torch.device) -> None:
    """Compiles each layer in place, for any batch and length; names of parameters stay as they are.

    UserError where the list of layers cannot be told or a CPU has no C++ compiler: compiling would fail at the first step only.
    """
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    if len(lists) != 1:
        raise UserError(f"model.compile=true: the layers of {type(decoder).__name__} are not in one list; set model.compile=false")
    _require_compiler(device)
    for layer in lists[0]:
        layer.compile(dynamic=True)


def compile_blocks(network: nn.Module, device: torch.device) -> None:
    """The same for a network of diffusers, whose blocks its class names; one that names none is compiled whole."""
    _require_compiler(device)
    names = set(getattr(network, "_repeated_blocks", None) or ()) or {n for n in network._no_split_modules or () if n.endswith("Block")}
    for block in [m for m in network.modules() if type(m).__name__ in names] or [network]:
        block.compile(dynamic=True)


def _require_compiler(device: torch.device) -> None:
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX") or "", "g++", "clang++")):
        raise UserError("model.compile=true needs a C++ compiler on a CPU, and neither g++ nor clang++ is on the PATH; install one, or set "
                        "model.compile=false")


def eagerly(compiled: bool) -> AbstractContextManager:
    """Without the compiled programs: sampling calls a layer with a cache that grows with each token."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
