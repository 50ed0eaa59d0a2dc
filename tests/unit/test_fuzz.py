"""Whatever is typed and whatever rows hold: one sentence, exit code 2, nothing left behind; never a traceback, never a hang.

`make fuzz` tries PREFOPT_FUZZ cases of each kind, drawn anew each time; otherwise there are a few, always the same ones.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from prefopt.cli import main
from prefopt.config.catalogue import groups
from prefopt.config.completion import primary_groups
from prefopt.config.schema import CHOICES, COMMANDS, all_keys
from prefopt.data.dataset import make_dataset
from prefopt.data.sources import load_data
from prefopt.errors import UserError
from tests.toy import COLUMNS, data_config, tokeniser

LONG = int(os.environ.get("PREFOPT_FUZZ", "0"))


def cases(few: int):
    """`few` cases, or as many as are asked for; a failure is made smaller either way."""
    return settings(max_examples=LONG or few, derandomize=not LONG, deadline=None, database=None, print_blob=False,
                    phases=[Phase.explicit, Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))


tried = 0


@contextmanager
def watched(case: object, capsys: pytest.CaptureFixture[str], seconds: int = 60):
    """Raises in what does not end: a case takes a fraction of a second. In a long run, says how far it is, and what failed."""
    global tried
    tried += 1

    def late(number, frame):
        raise AssertionError(f"it has not ended after {seconds} s")

    def say(what: str) -> None:
        if LONG:
            with capsys.disabled():
                print(f"[{time.process_time():.0f} CPU s] {what}", flush=True)

    begun = time.process_time()
    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    except BaseException as error:
        say(f"case {tried} fails, {case!r}: {error!r}"[:2000])
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    if tried % 500 == 0 or time.process_time() - begun > 10:
        say(f"{tried} cases; the last took {time.process_time() - begun:.1f} CPU s: {case!r}"[:2000])


# ---- command lines ----------------------------------------------------------------------------------

# A value may hold anything but what names a place outside of the folder that the test runs in.
TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="/\0"), max_size=12).filter(lambda t: ".." not in t)
FLOATS = st.floats(allow_subnormal=False)  # a run in this process has switched them off
NUMBERS = st.one_of(st.integers(), st.integers(-3, 40), FLOATS,
                    st.sampled_from(["1e400", "-0.0", "1_000", "0x1f", "+5", "1e-400", "NaN"]))
NAMES = st.sampled_from([name for names in groups().values() for name in names] + sorted({c for of in CHOICES.values() for c in of}))
ODD = st.sampled_from([
    "null", "true", "''", "[]", "{}", "[1,2", "{a:1", "{a:{b:[1]}}", "[[1,2],[3]]", "${seed}", "${nope}", "${oc.env:HOME}",
    "${oc.env:NOPE}", "${hydra:runtime.cwd}", "${now:%Y}", "${seed", "a,b", "1,2", "range(1,3)", "choice(1,2)", "int(1.5)", "glob(*)",
    "'", "\"", "\\", "a=b", "???", "{_target_:os.system}", "os.system", "prefopt.cli.main", "prefopt.objectives.pairwise.DPO",
    "\u00e9\u202e\n", "a b", "x" * 300,
])  # fmt: skip
VALUES = st.one_of(ODD, NAMES, NUMBERS.map(str), TEXT)


def mutated(words: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """The word, or one with a letter too few or too many."""
    return st.tuples(words, st.integers(0, 30), st.sampled_from(["", "", "", "x", ".", "drop"])).map(
        lambda t: t[0][: t[1]] + (t[0][t[1] + 1 :] if t[2] == "drop" else t[2] + t[0][t[1] :]))


def overrides(command: str) -> st.SearchStrategy[list[str]]:
    keys = [k for k in all_keys(COMMANDS[command]) if k != "run_dir"] + ["algo.beta", "algo._target_", "data.transforms.a.kind", "stages.a"]
    chosen = sorted(primary_groups(command))
    known = st.sampled_from(keys)
    key = st.one_of(known, known, known, known, known, mutated(known), TEXT)
    names = {group: st.sampled_from(groups().get(group) or ["x"]) for group in chosen or ["algo"]}
    choice = st.one_of(*[st.one_of(of, of, of, mutated(of)).map(f"{group}={{}}".format) for group, of in names.items()])
    setting = st.tuples(st.sampled_from(["", "", "", "", "+", "++", "~"]), key, VALUES).map(lambda t: f"{t[0]}{t[1]}={t[2]}")
    option = st.sampled_from(["--cfg", "job", "--info", "--resolve", "-m", "--package", "train", "--multirun", "--config-dir", "--nope",
                              "-x", "--cfg=hydra", "--config-name=x", "--config-name", "--version", "--run"])
    word = st.one_of(*[choice] * 4, *[setting] * 6)
    return st.tuples(st.lists(word, max_size=3), st.lists(st.one_of(word, word, TEXT, option), max_size=1)).map(lambda t: t[0] + t[1])


def words() -> st.SearchStrategy[list[str]]:
    composing = st.one_of(*[overrides(c).map(lambda o, c=c: [*(["data", "check"] if c == "data_check" else [c]), *o])
                            for c in ("train", "train", "train", "train", "eval", "sample", "label", "data_check")])
    plain = st.tuples(st.sampled_from(["list", "show", "compare", "runs", "store", "merge", "export", "completion", "data", "nope"]),
                      st.lists(st.one_of(VALUES, st.sampled_from(["ls", "verify", "rm", "--view", "algo", "--limit-gb", "-h", "output=a"])),
                               max_size=4)).map(lambda t: [t[0], *t[1]])
    return st.one_of(composing, composing, composing, composing, plain)


@pytest.fixture
def nothing_runs(monkeypatch):
    """Everything up to the first step: a run that has been composed, checked and claimed ends at once."""
    from prefopt.launch import app, jobs

    monkeypatch.setattr(app, "run_here", lambda cfg, *a, **k: {})
    monkeypatch.setattr(app, "run_stages", lambda *a, **k: None)
    monkeypatch.setattr(jobs, "run_job", lambda *a, **k: ("finished", ""))
    monkeypatch.setitem(app.TASKS, "data_check", lambda cfg: None)  # reads data, as the test below does


@cases(120)
@given(line=words())
@example(line=["train", "seed=" + "9" * 5000])
@example(line=["data", "check", "+=0"])
@example(line=["eval", "sampler=[[1,2],[3]]"])
@example(line=["compare", "x" * 300])
@example(line=["train", "hardware=16x8xh100_zero3_slurm"])
@example(line=["train", "data=jsonl", "data.path=" + "x" * 300])
def test_command_lines(line, tmp_path, nothing_runs, capsys):
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:  # hydra.verbose would slow every case after it
        if isinstance(logger, logging.Logger):
            logger.setLevel(logging.WARNING if logger is logging.root else logging.NOTSET)
    home = tmp_path / "here"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    os.chdir(home)
    capsys.readouterr()
    with watched(line, capsys):
        code = main(list(line))
        said = capsys.readouterr()
        assert code in (0, 1, 2), line
        assert "Traceback" not in said.err + said.out, line
        if code == 2:
            assert said.err.startswith("prefopt: ") and len(said.err) > 12, (line, said.err)
            assert not list(home.iterdir()), (line, "something was left behind")


# ---- rows ---------------------------------------------------------------------------------------------

WORDS = st.one_of(st.text(max_size=20), st.sampled_from(
    ["", " ", "Hello", "\n\nHuman: a\n\nAssistant: b", "\u202e", "<eos>", "{{ x }}", "\0", "\ud800", "~nobody/x", "../x"]))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), FLOATS, WORDS, st.sampled_from([0, 1, 0.5, -1, 2, 10**400, 1e308]))
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "", "User", 3, None])
PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "image", "x", None]), "text": SCALARS})
CONTENT = st.one_of(WORDS, SCALARS, st.lists(st.one_of(SCALARS, PART), max_size=2))
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": CONTENT}, optional={"train": SCALARS}),
    st.fixed_dictionaries({"from": ROLES, "value": SCALARS}), SCALARS)
IMAGE = st.fixed_dictionaries({"image": st.one_of(SCALARS, st.fixed_dictionaries({"path": SCALARS}))},
                              optional={"ops": SCALARS, "caption": SCALARS})
SIDE = st.one_of(WORDS, WORDS, WORDS, SCALARS, st.lists(MESSAGE, max_size=4), st.lists(WORDS, max_size=3), IMAGE)
LISTS = st.lists(st.one_of(SIDE, SCALARS), max_size=4)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=6)
NAMED = {name: st.one_of(SIDE, LISTS, JSON) for name in COLUMNS.values() if name}


def shaped(**columns: st.SearchStrategy) -> st.SearchStrategy[dict]:
    """Rows of one of the accepted shapes, with anything in their columns, and anything beside."""
    return st.fixed_dictionaries(columns, optional={k: v for k, v in NAMED.items() if k not in columns})


ROW = st.one_of(
    shaped(prompt=SIDE, chosen=SIDE, rejected=SIDE), shaped(chosen=SIDE, rejected=SIDE),
    shaped(prompt=SIDE, completions=LISTS, scores=LISTS), shaped(prompt=SIDE, completions=LISTS, ranks=LISTS),
    shaped(prompt=SIDE, completion=SIDE, label=SCALARS), shaped(prompt=SIDE, completion=SIDE), shaped(prompt=SIDE),
    shaped(messages=st.lists(MESSAGE, max_size=4)), JSON)
LINE = st.one_of(ROW.map(lambda row: json.dumps(row).encode()), st.binary(max_size=30))
VIEWS = st.sampled_from(["pairs", "unary", "demonstrations", "ranking"])


@pytest.fixture(scope="module")
def tokenise():
    return tokeniser("bytes", "chatml")


@cases(300)
@given(lines=st.lists(LINE, max_size=4), view=VIEWS, pictures=st.booleans(), rows=st.sampled_from([None] * 10 + list(CHOICES["data.rows"])),
       skip=st.booleans())
@example(lines=[b'{"prompt": "a", "chosen": "b", "rejected": "\\ud800"}'], view="pairs", pictures=False, rows=None, skip=True)
@example(lines=[b'{"prompt": "", "chosen": "", "rejected": {"image": "\\u0000"}}'], view="pairs", pictures=False, rows=None, skip=False)
@example(lines=[b'{"prompt": "a", "chosen": {"image": "~nobody/x"}, "rejected": {"image": "b"}}'], view="pairs", pictures=True, rows=None,
         skip=False)
def test_rows(lines, view, pictures, rows, skip, tmp_path, tokenise, capsys):
    """From the file to token ids. Every row is used, left out and counted, or named in the sentence that ends it."""
    file = tmp_path / "rows.jsonl"
    lines = [line.replace(b"\n", b" ") for line in lines]
    file.write_bytes(b"\n".join(lines))
    cfg = data_config(source="files", path=str(file), name="fuzz", pictures=pictures, rows=rows, eval_fraction=0.0,
                      on_bad_row="skip" if skip else "stop")
    with watched(lines, capsys):
        try:
            train, _ = load_data(cfg)
            made = make_dataset(train, cfg, tokenise, view, ("label", "weight", "margin"), False, 0) if not pictures else None
        except UserError as error:
            assert str(error).strip() and "\n\n" not in str(error)
            return
    if made is not None and rows is None:  # published sets make several rows of one, or one of several
        used = made.stats["rows"] + made.stats["undesirable_left_out"]
        assert used + len(train.rejected) + train.no_preference.total() == sum(bool(line.strip()) for line in lines)
