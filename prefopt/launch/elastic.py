"""Starts the worker processes of one machine with torch elastic and passes on how they ended. `python -m prefopt.launch.elastic N`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid


def main() -> int:
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # the agent's own notices would bury the worker's one sentence
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=int(sys.argv[1]), run_id=uuid.uuid4().hex, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.2)
    try:
        elastic_launch(config, sys.executable)("-m", "prefopt.launch.worker")
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as stop:
        return 130 if stop.sigval == signal.SIGINT else 143
    return 0


if __name__ == "__main__":
    sys.exit(main())
