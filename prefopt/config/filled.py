"""A dataclass of the schema as OmegaConf sees it, filled with plain data."""

from __future__ import annotations

from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf


@cache
def _structured(schema: type) -> DictConfig:
    return OmegaConf.structured(schema)  # as long as all the rest of the merge


def filled(schema: type, given: Any) -> DictConfig:
    """`given` over the defaults of `schema`. Raises OmegaConf's errors for unknown keys and wrong types."""
    return OmegaConf.merge(_structured(schema), given)  # which copies it first
