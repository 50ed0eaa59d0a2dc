"""Embeddings of users: what a diffusion model is told of the person whose preference a row is (PPD, arXiv 2501.06655).

They are made beforehand, by whoever has a vision-language model: its hidden states over a few of a user's comparisons. The simplest ones
are one-hot, which know nothing of new users. A row gives its user's numbers, or a name that stands in the file `data.users`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt.data.records import BadRow
from prefopt.errors import UserError, nearest

READ = (".safetensors", ".npz")


def read_users(path: str) -> dict[str, Tensor]:
    """Name -> embedding, fp32, of each array in the file. Raises `UserError`."""
    file = Path(path).expanduser()
    if file.suffix not in READ:
        raise UserError(f"data.users={path}: cannot read this kind of file; use {' or '.join(READ)}, with an array for each user's name")
    if not file.is_file():
        raise UserError(f"data.users={path}: there is no such file (looked from {Path.cwd()})")
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]).float() for name in arrays.files}
        from safetensors.torch import load_file

        return {name: value.float() for name, value in load_file(file).items()}
    except Exception as error:  # zip files, pickles and damaged headers raise many types
        raise UserError(f"data.users={path}: it cannot be read ({type(error).__name__}: {str(error)[:150]})") from error


def embedding(said: Any, width: int, named: dict[str, Tensor], path: str | None) -> Tensor:
    """[T, width] fp32 of what a row says of its user: a name (a whole number is one) among `named`, which the file `path` holds, or the
    numbers themselves, [T, width] or [width]. Raises `BadRow`."""
    if isinstance(said, (str, int)):
        name = str(said)
        if not path:
            raise BadRow(f"its user is {name[:60]!r}, a name, and no file says who that is; set data.users=FILE, or give a list of numbers")
        if name not in named:
            raise BadRow(f"data.users={path} has no user {name[:60]!r}{nearest(name, named)}")
        found, who = named[name], f"the user {name[:60]!r} of data.users={path}"
    else:
        who = "its user"
        try:
            found = torch.as_tensor(np.asarray(said, dtype=np.float32))
        except (TypeError, ValueError):
            raise BadRow(f"its user is {str(said)[:40]!r}, neither a name nor a list of numbers") from None
    if found.dim() not in (1, 2) or not found.numel() or found.shape[-1] != width:
        raise BadRow(f"{who} has the shape {list(found.shape)}, and model.user_width is {width}: it must be [{width}] or [tokens, {width}]")
    if not math.isfinite(float(found.abs().max())):
        raise BadRow(f"{who} has numbers that are not finite")
    return found.view(-1, width)
