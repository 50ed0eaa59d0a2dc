"""What a worker process runs: the training loop on the config in its environment. `python -m prefopt.launch.worker`."""

from __future__ import annotations

import json
import os
import sys

from prefopt.launch.local import CONFIG_ENV


def main() -> int:
    from omegaconf import OmegaConf

    from prefopt.cli import guarded
    from prefopt.config.schema import TrainConfig
    from prefopt.training.loop import train

    algo = json.loads(os.environ[CONFIG_ENV])
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), algo))
    return guarded(lambda: train(cfg), quiet=os.environ.get("RANK", "0") != "0")


if __name__ == "__main__":
    sys.exit(main())
