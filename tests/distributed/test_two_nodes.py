"""Two machines: network namespaces that a veth pair joins, on one shared folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt.tracking.tracker import read_jsonl
from prefopt.training import checkpoint
from tests.distributed.launching import BANDIT, begin, end, program, read, record, under_way, wait
from tests.toy_runs import train

NODES = {"a": "10.213.7.1", "b": "10.213.7.2"}
STEPS = 1200  # enough that a fast machine is not done before it is lost


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.fixture(scope="module")
def nodes():
    """Name of the namespace of each node."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` here, which makes network namespaces")
    names = {node: f"prefopt{os.getpid()}{node}" for node in NODES}
    try:
        for name in names.values():
            ip("netns", "add", name)
        ip("link", "add", names["a"][-15:], "netns", names["a"], "type", "veth", "peer", "name", names["b"][-15:], "netns", names["b"])
        for node, name in names.items():
            ip("-n", name, "addr", "add", f"{NODES[node]}/24", "dev", name[-15:])
            for device in ("lo", name[-15:]):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        _remove(names)
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    yield names
    _remove(names)


def _remove(names: dict[str, str]) -> None:
    for name in names.values():
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def kill_node(name: str) -> None:
    """Ends everything that runs on a node at once."""
    for pid in ip("netns", "pids", name).split():
        os.kill(int(pid), signal.SIGKILL)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.steps(folder / "checkpoints")[-1] / "weights.safetensors")


def test_a_run_survives_a_machine_and_world_sizes_2_1_2_end_where_one_process_ends(nodes, tmp_path):
    """Started over ssh on two machines; one is lost in mid-run; goes on with one process, and then on two machines again."""
    run, shared = tmp_path / "run", [*BANDIT, f"train.steps={STEPS}", "train.save_every=10"]
    cases = " ".join(f"{NODES[node]}) node={name};;" for node, name in nodes.items())
    program(tmp_path / "bin", "ssh", 'while [[ "$1" == -* ]]; do shift; [[ "$1" == *=* ]] && shift; done\n'
                                     f'case "$1" in {cases} *) exit 255;; esac\nexec ip netns exec "$node" bash -c "$2"')
    (tmp_path / "hosts").write_text(f"# two machines\n{NODES['a']} slots=1\n{NODES['b']}\n")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    over_ssh = ["hardware=cpu", "hardware.nodes=2", "hardware.launcher=ssh", f"hardware.hostfile={tmp_path / 'hosts'}"]
    first = begin(*shared, *over_ssh, f"hydra.run.dir={run}", PATH=path, HF_TOKEN="hf_" + "x" * 20)
    wait(lambda: len(checkpoint.steps(run / "checkpoints")) > 0, first)
    under_way(run, first)
    lost = next(node for node, name in nodes.items() if str(record(run, 1)["pid"]) in ip("netns", "pids", name).split())
    assert record(run, 0)["pid"] and lost in NODES
    command_lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in ip("netns", "pids", nodes[lost]).split()]
    assert not any(b"hf_x" in line for line in command_lines)
    kill_node(nodes[lost])
    code, said = end(first)
    assert code != 0 and "rank 1 was lost" in said and f"hydra.run.dir={run} goes on from the last checkpoint" in said
    assert f"{NODES['a']}| " in said and "Traceback" not in said and "frame #" not in said
    status = read(run / "status.json")
    assert status["state"] == "failed" and "rank 1 was lost" in status["message"]

    second = begin(*shared, "hardware=cpu", f"hydra.run.dir={run}")  # the one machine that is left
    wait(lambda: "resuming after step" in (text := second.stderr.readline()) or not text)
    before = len(read_jsonl(run / "metrics.jsonl"))
    wait(lambda: len(read_jsonl(run / "metrics.jsonl")) > before + 5, second)
    second.terminate()
    assert end(second)[0] == 143
    assert read(run / "status.json")["state"] == "stopped"

    both = ["hardware=cpu", "hardware.nodes=2", f"hardware.rendezvous={NODES['a']}:29411", f"hydra.run.dir={run}"]
    third = [begin(*shared, *both, before=("ip", "netns", "exec", name)) for name in reversed(nodes.values())]
    ends = [end(part) for part in third]
    assert [code for code, _ in ends] == [0, 0], ends
    assert sum("resuming after step" in said for _, said in ends) == 1  # rank 0 speaks
    assert read(run / "status.json")["state"] == "finished"

    steps = [row["step"] for row in read_jsonl(run / "metrics.jsonl") if row["split"] == "train"]
    assert steps == list(range(1, STEPS + 1))  # no row lost or doubled, whoever made it
    assert train(tmp_path / "one", *shared, "train.batch_size=32", "data.limit=null", "data.eval_limit=null") == 0
    losses = [row["loss"] for row in read_jsonl(tmp_path / "one" / "metrics.jsonl") if row["split"] == "train"]
    assert losses[-1] < losses[0] - 0.05  # there is something to be equal in
    one, two = weights(tmp_path / "one"), weights(run)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
