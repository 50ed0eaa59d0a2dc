"""What of Hydra's own settings could run code: `_target_` of callbacks, sweepers and launchers, and factories of logging. A config group
may be somebody else's file, so these may name nothing but prefopt, Hydra and its plugins. Hydra itself refuses a list of known targets in
recent versions, and looks at no factory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prefopt.errors import UserError

TARGETS = ("prefopt.", "hydra.", "hydra_plugins.", "optuna.samplers.")  # the last: of Hydra's plugin for Optuna
FACTORIES = ("colorlog.ColoredFormatter",)  # of Hydra's own logging
LOGGING = re.compile(r"logging\.(handlers\.)?\w*(Handler|Formatter|Filter)")
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


@contextmanager
def own_code_only() -> Iterator[None]:
    """In it, Hydra composes nothing that `check_hydra` refuses. It has no hook of its own between composing and calling."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    real = ConfigLoaderImpl.load_configuration

    def load_configuration(self: Any, *args: Any, **kwargs: Any) -> DictConfig:
        cfg = real(self, *args, **kwargs)
        check_hydra(OmegaConf.to_container(cfg, resolve=False).get("hydra") or {})
        return cfg

    ConfigLoaderImpl.load_configuration = load_configuration
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = real


def check_hydra(node: Any, path: str = "hydra") -> None:
    """Raises `UserError` for a setting under the block `hydra` that names foreign code."""
    if isinstance(node, dict):
        for key, value in node.items():
            where = f"{path}.{key}"
            if isinstance(value, str) and not _own(str(key), value, "_logging" in path):
                raise UserError(f"{where}={value} would run code that is neither prefopt's nor Hydra's; take it out of the config")
            check_hydra(value, where)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            check_hydra({str(i): value}, path)


def _own(key: str, value: str, logging: bool) -> bool:
    """Whether a setting is none that is called, or one that may be. An interpolation could become anything."""
    if key == "_target_":
        return value.startswith(TARGETS)
    if not logging:
        return True
    if key == "()":
        return value in FACTORIES
    if key == "class":
        return bool(LOGGING.fullmatch(value))
    return not value.startswith("ext://") or value in STREAMS
