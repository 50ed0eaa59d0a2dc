"""The store on disk: entries, shards, writers side by side, kills, damage, room. No model is needed for any of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from prefopt import cli
from prefopt.errors import UserError
from prefopt.policies import store
from prefopt.policies.store import Store, digest_of, entry_key, evict

WHO = {"weights": "w" * 64, "precision": "fp32", "chat_template": None}
LENGTHS = (3, 1, 5, 2)


def entries(start: int = 0, count: int = 4) -> tuple[dict[bytes, np.ndarray], dict[bytes, int]]:
    """Made-up token log-probs of `count` replies."""
    keys = [entry_key([1, 2], [start + i], [True]) for i in range(count)]
    lengths = {key: LENGTHS[i % 4] for i, key in enumerate(keys)}
    return {key: -np.arange(1, lengths[key] + 1, dtype=np.float32) - start for key in keys}, lengths


def summed(tokens: dict[bytes, np.ndarray]) -> dict[bytes, np.ndarray]:
    return {key: values.sum(keepdims=True) for key, values in tokens.items()}


def opened(root: Path, wanted, level: str = "tokens", identity: dict = WHO) -> Store:
    made = Store(identity, wanted, level, "toy", root)
    made.refresh()
    return made


@pytest.mark.parametrize("level", ["tokens", "sums"])
def test_what_is_written_is_read_again_to_the_bit(level, tmp_path):
    tokens, lengths = entries()
    kept = tokens if level == "tokens" else summed(tokens)
    opened(tmp_path, kept, level).add(kept, lengths)
    again = opened(tmp_path, [*kept, b"another".ljust(16)], level)
    assert again.missing() == {b"another".ljust(16)}
    assert all(np.array_equal(again.found[key], kept[key]) for key in kept)
    assert json.loads((again.folder / "identity.json").read_text()) == {"model": "toy", "identity": WHO}


def test_token_entries_serve_sums_and_sums_serve_no_tokens(tmp_path):
    tokens, lengths = entries()
    opened(tmp_path, tokens, "tokens").add(tokens, lengths)
    sums = opened(tmp_path, tokens, "sums")
    assert {k: v.tolist() for k, v in sums.found.items()} == {k: v.tolist() for k, v in summed(tokens).items()}
    other, more = entries(100)
    opened(tmp_path, other, "sums").add(summed(other), more)
    assert opened(tmp_path, other, "tokens").missing() == set(other)


def test_a_sum_that_was_stored_comes_before_one_made_of_tokens(tmp_path):
    """So that what a run has read once does not change when somebody adds the tokens."""
    tokens, lengths = entries()
    rounded = {key: values + np.float32(1e-3) for key, values in summed(tokens).items()}
    opened(tmp_path, tokens, "sums").add(rounded, lengths)
    opened(tmp_path, tokens, "tokens").add(tokens, lengths)
    for _ in range(2):
        assert {k: v.tolist() for k, v in opened(tmp_path, tokens, "sums").found.items()} == {k: v.tolist() for k, v in rounded.items()}


def test_the_key_of_a_reply_knows_prompt_ids_and_mask():
    base = ([1, 2], [3, 4], [True, True])
    others = [([1], [2, 3, 4], [True] * 3), ([1, 2], [3, 5], [True, True]), ([9, 2], [3, 4], [True, True]),
              ([1, 2], [3, 4], [False, True]), ([1, 2, 3], [4], [True])]
    keys = {entry_key(*case) for case in (base, *others)}
    assert len(keys) == 6 and all(len(key) == 16 for key in keys) and entry_key(*base) in keys


def test_another_identity_is_another_folder(tmp_path):
    tokens, lengths = entries()
    opened(tmp_path, tokens).add(tokens, lengths)
    for change in ({"weights": "v" * 64}, {"chat_template": "x"}, {"precision": "bf16"}, {"max_prompt_tokens": 3}):
        assert digest_of({**WHO, **change}) != digest_of(WHO)
        assert opened(tmp_path, tokens, identity={**WHO, **change}).missing() == set(tokens)
    assert digest_of(dict(reversed(WHO.items()))) == digest_of(WHO)


def test_the_same_entries_make_the_same_file(tmp_path):
    tokens, lengths = entries()
    for order in (tokens, dict(reversed(tokens.items()))):
        opened(tmp_path, []).add(order, lengths)
    assert len(store.shards(tmp_path)) == 1


# ---- several processes ------------------------------------------------------------------------------


def _fill(root: Path, order: list[int], barrier, told) -> None:
    """What a run does, without its model: chunk by chunk, looking at what others have written."""
    chunks = [entries(10 * i) for i in range(12)]
    mine = Store(WHO, {key for tokens, _ in chunks for key in tokens}, "tokens", "toy", root)
    barrier.wait()
    made = 0
    for number in order:
        mine.refresh()
        tokens, lengths = chunks[number]
        if fresh := {key: values for key, values in tokens.items() if key not in mine.found}:
            time.sleep(0.02)  # scoring takes its time
            mine.add(fresh, lengths)
            made += 1
    mine.refresh()
    told.put((made, len(mine.missing())))


def test_two_processes_fill_one_store_and_share_the_work(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, told = context.Barrier(2), context.Queue()
    orders = list(range(12)), list(reversed(range(12)))
    workers = [context.Process(target=_fill, args=(tmp_path, order, barrier, told)) for order in orders]
    for worker in workers:
        worker.start()
    results = [told.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert [missing for _, missing in results] == [0, 0]
    assert sum(made for made, _ in results) < 24  # both alone would have made 12 each
    assert store.verify(tmp_path) == (len(store.shards(tmp_path)), [])
    every = {key: values for i in range(12) for key, values in entries(10 * i)[0].items()}
    read = opened(tmp_path, every)
    assert all(np.array_equal(read.found[key], values) for key, values in every.items())


WRITER = """
import sys
from pathlib import Path
from prefopt.policies.store import Store
from tests.unit.test_store import WHO, entries
number = 0
while True:
    tokens, lengths = entries(10 * number, 4000)
    Store(WHO, tokens, "tokens", "toy", Path(sys.argv[1])).add(tokens, lengths)
    print(number, flush=True)
    number += 1
"""


def test_kill_9_leaves_finished_chunks_and_nothing_broken(tmp_path):
    """A subprocess, because nothing in this process can stand for SIGKILL."""
    root = Path(__file__).parents[2]
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root)
    finished = [int(writer.stdout.readline()) for _ in range(3)]
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert finished == [0, 1, 2]
    count, broken = store.verify(tmp_path)
    assert count >= 3 and broken == []
    for number in finished:
        tokens, _ = entries(10 * number, 4000)
        assert opened(tmp_path, tokens).missing() == set()


def test_a_half_written_file_is_not_read_and_goes_after_an_hour(tmp_path):
    tokens, lengths = entries()
    mine = opened(tmp_path, tokens)
    mine.add(tokens, lengths)
    old, new = mine.folder / ".a.safetensors.1-x.part", mine.folder / ".b.safetensors.2-x.part"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * store.STALE,) * 2)
    assert opened(tmp_path, tokens).missing() == set()
    assert store.collect(tmp_path, 1e9) == {"stale": [old], "damaged": [], "evicted": []}
    assert new.exists() and not old.exists()


# ---- damage and room ---------------------------------------------------------------------------------


def test_a_damaged_shard_is_named_and_removed_by_gc(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path))
    root = tmp_path / "reference"
    tokens, lengths = entries()
    opened(root, tokens).add(tokens, lengths)
    (shard,) = store.shards(root)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged: its content does not match its name.*prefopt store gc.*prefopt store verify") as caught:
        opened(root, tokens)
    assert str(shard) in str(caught.value)
    assert cli.main(["store", "verify"]) == 1
    assert f"damaged: {shard}" in capsys.readouterr().out
    assert cli.main(["store", "gc"]) == 0
    assert "removed 1 damaged shards" in capsys.readouterr().out
    assert not root.exists() or not any(root.iterdir())
    assert cli.main(["store", "verify"]) == 0
    assert opened(root, tokens).missing() == set(tokens)


def aged(root: Path, count: int) -> list[Path]:
    """Shards of `count` scorers, the first one used longest ago."""
    made = []
    for i in range(count):
        tokens, lengths = entries(100 * i)
        who = {**WHO, "weights": str(i)}
        mine = opened(root, tokens, identity=who)
        mine.add(tokens, lengths)
        (path,) = mine.used
        os.utime(path, (1e9 + i,) * 2)
        made.append(path)
    return made


def test_eviction_keeps_the_most_recently_used_and_what_is_in_use(tmp_path):
    first, second, third, fourth = aged(tmp_path, 4)
    size = first.stat().st_size
    again = opened(tmp_path, entries(0)[0], identity={**WHO, "weights": "0"})
    again.touch()  # the oldest is read again
    assert evict(tmp_path, 3 * size + 1) == [second]
    assert not second.parent.exists()  # its scorer has nothing left
    assert evict(tmp_path, size, keep=[third]) == [fourth, first]
    assert store.shards(tmp_path) == [third]
    assert evict(tmp_path, 0, keep=[third]) == []
    assert evict(tmp_path, 0) == [third] and store.shards(tmp_path) == []


def test_an_evicted_shard_that_was_read_stays_readable(tmp_path):
    tokens, lengths = entries()
    opened(tmp_path, tokens).add(tokens, lengths)
    mine = opened(tmp_path, tokens)
    evict(tmp_path, 0)
    mine.touch()
    mine.refresh()
    assert mine.missing() == set()
    mine.add(*entries(7))  # its folder is made anew
    assert len(store.shards(tmp_path)) == 1 and (mine.folder / "identity.json").is_file()


# ---- prefopt store -----------------------------------------------------------------------------------


def test_ls_and_gc(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PREFOPT_STORE", str(tmp_path))
    assert cli.main(["store", "ls"]) == 0 and "holds nothing" in capsys.readouterr().out
    paths = aged(tmp_path / "reference", 3)
    assert cli.main(["store", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["scorer", "model", "precision", "entries", "shards", "size", "last", "used"]
    assert [line.split()[0] for line in lines[1:4]] == [p.parent.name[:12] for p in reversed(paths)]
    assert all(line.split()[1:5] == ["toy", "fp32", "4", "1"] for line in lines[1:4])
    assert cli.main(["store", "verify"]) == 0 and "3 shards, all as they were written" in capsys.readouterr().out
    assert cli.main(["store", "gc"]) == 0 and len(store.shards(tmp_path / "reference")) == 3
    keep = paths[-1].stat().st_size * 1.5 / 1e9
    assert cli.main(["store", "gc", "--limit-gb", str(keep)]) == 0 and store.shards(tmp_path / "reference") == paths[-1:]
    assert cli.main(["store", "gc", "--all"]) == 0 and store.shards(tmp_path / "reference") == []
    assert "1 shards not used for longest; 0 B left" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "said"), [
    ([], "prefopt store is no command of its own"),
    (["list"], "unknown command 'store list'"),
    (["ls", "--all"], "prefopt store ls takes nothing more, and was given --all"),
    (["gc", "--limit", "3"], "does not know --limit; did you mean '--limit-gb'?"),
    (["gc", "--limit-gb", "much"], "--limit-gb much: it must be a number of gigabytes"),
    (["gc", "--limit-gb"], "it must be a number of gigabytes"),
    (["gc", "--limit-gb=-1"], "--limit-gb -1: it must be a number"),
])
def test_what_store_does_not_take(argv, said, capsys):
    assert cli.main(["store", *argv]) == 2
    assert said in capsys.readouterr().err


def test_ls_imports_no_torch(tmp_path):
    """In a fresh process, since this one has torch already."""
    code = "import sys; from prefopt import cli; cli.main(['store', 'ls']); sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PREFOPT_STORE": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0


def test_a_store_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    tokens, lengths = entries()
    monkeypatch.setattr(store, "_write", refuse)
    with pytest.raises(UserError, match="cannot be written.*PREFOPT_STORE.*reference.store=off"):
        opened(tmp_path, tokens).add(tokens, lengths)
