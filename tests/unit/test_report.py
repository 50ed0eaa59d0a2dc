"""The run report: what it says, what it escapes, and that nothing missing or broken stops it."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml

from prefopt.errors import UserError
from prefopt.report import run_report
from prefopt.report.alarms import GUIDE
from prefopt.report.plots import Series, chart, compact, duration, number, smooth, thin, tidy
from prefopt.report.run_report import difference_interval, sample_cards, verdict, write_report
from tests.unit.test_alarms import two_evals

FILES = ["config.yaml", "manifest.json", "status.json", "metrics.jsonl", "samples.jsonl"]
SPEED = {"unit": "pairs", "steps": 198, "seconds": 39.2, "rows_per_second": 5.12, "tokens_per_second": 2340.4, "useful_mfu": 0.412,
         "hardware_mfu": 0.619, "padding": 0.034, "peak_memory": 9_120_000_000}
WORDS = "the small red fox sleeps under a quiet bridge while two grey herons walk slowly home".split()


def train_row(step: int, steps: int, rng: random.Random) -> dict:
    x = step / steps
    margin = 2.6 * (1 - math.exp(-3 * x)) + rng.gauss(0, 0.25)
    return {
        "step": step, "seconds": 2 + 0.41 * step, "split": "train", "loss": math.log1p(math.exp(-margin)),
        "reward/chosen": margin / 2, "reward/rejected": -margin / 2, "reward/margin": margin,
        "accuracy": min(1.0, 0.5 + 0.42 * (1 - math.exp(-4 * x)) + rng.gauss(0, 0.06)),
        "logp/chosen": -21 + 2 * x + rng.gauss(0, 1.5), "logp/rejected": -23 - 9 * x + rng.gauss(0, 1.5),
        "grad_norm": 4.2 * math.exp(rng.gauss(0, 0.4) - x) * (12 if step == 31 else 1),
        "lr": 5e-5 * min(1.0, step / (0.1 * steps)) * (0.5 + 0.5 * math.cos(math.pi * x)),
        "tokens_per_second": 1500 + rng.gauss(0, 60), "tokens": 617 * step, "skipped_steps": 0,
        "rows_per_second": 5 + rng.gauss(0, 0.2), "useful_mfu": 0.41 + rng.gauss(0, 0.01), "hardware_mfu": 0.62 + rng.gauss(0, 0.01),
        "padding": 0.03 + 0.02 * rng.random(), "peak_memory": 9e9 + 1e6 * step,
    }  # fmt: skip


def sample_rows(step: int, x: float, count: int, rng: random.Random) -> list[dict]:
    rows = []
    for i in range(count):
        words = [WORDS[(i + j) % len(WORDS)] for j in range(14 + i % 5 + int(3 * x))]
        reward = round(0.4 + 1.4 * x + rng.gauss(0, 0.7), 3)
        prompt = f"Write a line about the {WORDS[i % len(WORDS)]}."
        rows.append({
            "step": step, "id": i, "prompt": prompt, "completion": " ".join(words), "reward": reward,
            "tokens": len(words) + 1, "finished": i % 23 != 0,
        })  # fmt: skip
    return rows


def eval_row(step: int, steps: int, samples: list[dict]) -> dict:
    x = step / steps
    rewards = [row["reward"] for row in samples]
    half = 1.96 * stdev(rewards) / math.sqrt(len(rewards))
    gained = 1 - math.exp(-3 * x)
    return {
        "step": step, "seconds": 2 + 0.41 * step, "split": "eval", "loss": 0.693 - 0.42 * gained,
        "accuracy": 0.5 + 0.36 * gained, "reward/margin": 2.1 * gained,
        "logp/chosen": -21.4 + 0.6 * x, "logp/rejected": -23.1 - 6 * x,
        "true_reward": mean(rewards), "true_reward_low": mean(rewards) - half,
        "true_reward_high": mean(rewards) + half,
        "win_rate": 0.5 + 0.3 * gained, "win_rate_low": 0.5 + 0.3 * gained - 0.09,
        "win_rate_high": 0.5 + 0.3 * gained + 0.09, "kl": 3.2 * x, "kl_low": 2.8 * x, "kl_high": 3.6 * x,
        "length": mean(row["tokens"] for row in samples),
        "finished": mean(row["finished"] for row in samples),
    }  # fmt: skip


def make_run(folder: Path, steps: int = 200, prompts: int = 64, seed: int = 0) -> Path:
    """A run directory as a finished DPO run on a small model leaves it."""
    folder.mkdir(parents=True)
    rng, rows, samples = random.Random(seed), [], []
    for step in range(steps + 1):
        if step:
            rows.append(train_row(step, steps, rng))
        if step % max(1, steps // 8) == 0:
            samples += sample_rows(step, step / steps, prompts, rng)
            rows.append(eval_row(step, steps, samples[-prompts:]))
    config = {
        "algo": {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}, "model": {"name": "tiny-lm"},
        "data": {"name": "tiny_feedback"}, "seed": 3, "optim": {"lr": 5e-5, "schedule": "cosine"},
        "train": {"batch_size": 16, "steps": steps},
    }  # fmt: skip
    manifest = {
        "command": ["prefopt", "train", "algo=dpo", "model=tiny-lm", "seed=3"],
        "started": "2026-01-15T10:21:07+00:00", "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
        "platform": "Linux x86_64", "device": "cpu", "machine": "A Fine CPU", "threads": 2, "processes": 1,
        "peak": {"tflops": 0.0553, "from": "a measured matrix product"}, "data": {"train": 2000, "eval": 256},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    }  # fmt: skip
    status = {"state": "finished", "step": steps, "total_steps": steps, "seconds": 84.2, "speed": SPEED}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "status.json", status)
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "samples.jsonl", samples)
    return folder


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data))


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every start tag with its attributes, and the visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.stack, self.words = [], [], []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br", "path", "polyline", "polygon"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.words += [data] if not self.stack or self.stack[-1] not in ("style", "title") else []


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run")


def test_a_full_run_shows_every_part(run):
    html, seen = page(run), Tags(page(run))
    assert not seen.stack, "every tag is closed"
    assert html.lstrip().startswith("<!doctype html>")
    for words in (
        "dpo on tiny-lm with tiny_feedback", "finished", "True reward rose from", "Figure 1. True reward.",
        "Figure 14.", "Log-probability of the replies", "Reward against KL", "Gradient norm", "Learning rate",
        "Largest gain", "Largest loss", "No alarm.", "Resolved config", "Manifest",
        "prefopt train algo=dpo model=tiny-lm seed=3", "a tie counts one half", "in nats",
    ):  # fmt: skip
        assert words in seen.text, words
    assert "Not shown" not in seen.text and "Not checked" not in seen.text
    assert len([tag for tag, _ in seen.tags if tag == "svg"]) == 14
    assert "nan" not in re.sub(r"<[^>]*>", "", html).lower().split()


def test_speed_is_in_view(run, tmp_path):
    """Averages of the whole run as tiles, with what they are a share of; curves of the rest."""
    text = Tags(page(run)).text
    for words in (
        "Pairs per second 5.12 2340 tokens/s", "Useful MFU 41 % hardware MFU 62 %", "Padding 3 % of the positions computed",
        "Peak memory 9.12 GB of a process", "Machine: A Fine CPU, 2 threads. Its peak: 55.3 GFLOP/s (a measured matrix product).",
        "The averages at the top are over 198 steps, without the first two of each start", "2340 tokens/s while training",
    ):  # fmt: skip
        assert words in text, words
    gone = ("rows_per_second", "useful_mfu", "hardware_mfu")  # a table has no FLOPs; older runs have no speeds
    folder = with_rows(run, tmp_path, lambda row: {k: v for k, v in row.items() if k not in gone})
    write_json(folder / "status.json", {"state": "finished", "speed": {"unit": "rows", "padding": 0.0}})
    text = Tags(page(folder)).text
    assert "Rows per second (no speed was recorded), Share of the machine’s peak (the FLOPs of this model are not known)" in text.replace(
        "; ", ", ")
    assert "Useful MFU 4" not in text and "Padding 0 %" in text
    for odd in ({"speed": None}, {"speed": "fast"}, {"speed": {"unit": None, "rows_per_second": "many"}}):
        write_json(folder / "status.json", odd)
        assert not Tags(page(folder)).stack


def test_the_page_needs_nothing_from_outside(run):
    html = page(run)
    for tag, attributes in Tags(html).tags:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "base", "form"), tag
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "data", "xlink:href", "style"), (tag, name)
            assert not name.startswith("on"), (tag, name)
            if name == "href":
                assert value.startswith("#"), value  # this run has no alarm; alarms link to a file beside the report
    assert not re.search(r"https?://|url\(|@import", html)
    assert "default-src 'none'" in html, "the browser itself refuses to load anything"


def test_everything_models_and_data_say_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&</pre></details><img src=x onerror=alert(1)>"
    folder = make_run(tmp_path / "run", steps=8, prompts=8)
    samples = read_lines(folder / "samples.jsonl")
    samples = [s | {"prompt": evil, "completion": evil * 20, "id": f"{evil}{s['id']}"} for s in samples]
    write_lines(folder / "samples.jsonl", samples)
    rows = [row | {f"loss/{evil}": 0.1, "loss/other": 0.1} for row in read_lines(folder / "metrics.jsonl")]
    write_lines(folder / "metrics.jsonl", rows)
    config = {part: {"name": evil, evil: 0.1} for part in ("algo", "model", "data")} | {"seed": evil}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_json(folder / "manifest.json", {"command": ["prefopt", evil], "started": evil, evil: [evil]})
    write_json(folder / "status.json", {"state": "failed", "step": evil, "message": evil})
    html = page(folder)
    tags = [tag for tag, _ in Tags(html).tags]
    assert not {"script", "img"} & set(tags)
    assert "<script" not in html and "&lt;script&gt;" in html
    assert html.count("<title>") - 1 == tags.count("circle"), "no title was closed and opened by data"


def test_odd_text_survives(tmp_path):
    folder = make_run(tmp_path / "run", steps=8, prompts=6)
    samples = read_lines(folder / "samples.jsonl")
    texts = ["", "   ", "half a pair \ud83d", "x" * 5000, "مرحبا", None]
    write_lines(folder / "samples.jsonl", [s | {"completion": texts[s["id"]]} for s in samples])
    html = page(folder)
    assert "(empty reply)" in html and "مرحبا" in html and "the whole text (5000 characters)" in html


def test_secrets_do_not_reach_the_page(tmp_path):
    folder = make_run(tmp_path / "run", steps=8, prompts=6)
    token = "hf_" + "aB3" * 12
    write_json(folder / "manifest.json", {"command": f"prefopt train hub_token={token}", "note": token})
    assert token not in page(folder)


def with_rows(run: Path, tmp_path: Path, edit) -> Path:
    """A copy of the run whose metric rows went through `edit`; None drops a row."""
    folder = tmp_path / "edited"
    folder.mkdir(exist_ok=True)
    for path in run.iterdir():
        if path.suffix in (".json", ".jsonl", ".yaml"):
            (folder / path.name).write_bytes(path.read_bytes())
    rows = [new for row in read_lines(run / "metrics.jsonl") if (new := edit(dict(row))) is not None]
    write_lines(folder / "metrics.jsonl", rows)
    return folder


def test_an_empty_directory_gives_a_page(tmp_path):
    text = Tags(page(tmp_path)).text
    assert all(f"{name} is missing." in text for name in FILES)
    assert "No measurements yet." in text and "Nothing could be checked yet." in text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, b"", b"[1, 2]\n", b"{\n: [\xff", b"null\n3\n\"x\"\n"])
def test_each_file_may_be_missing_or_broken(tmp_path, name, content):
    folder = make_run(tmp_path / "run", steps=8, prompts=6)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    assert not Tags(page(folder)).stack


def test_a_broken_last_line_costs_only_itself(run, tmp_path):
    folder = with_rows(run, tmp_path, lambda row: row)
    before = page(folder)
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": 201, "split": "tra')
    after = page(folder)
    assert "metrics.jsonl: 1 line could not be read" in after
    assert after.count("<svg") == before.count("<svg")


def test_a_run_without_pairs_says_why_panels_are_missing(run, tmp_path):
    pairs = ("accuracy", "reward/margin", "logp/chosen", "logp/rejected", "reward/chosen", "reward/rejected")
    folder = with_rows(run, tmp_path, lambda row: {k: v for k, v in row.items() if k not in pairs})
    text = Tags(page(folder)).text
    titles = "Reward margin, Accuracy, Log-probability of the replies"
    assert f"Not shown: {titles} (this objective reports no pairs)" in text
    assert "likelihood displacement (needs held-out log-probabilities at two evaluations)" in text


def test_no_true_reward_falls_back_to_the_win_rate(run, tmp_path):
    folder = with_rows(run, tmp_path, lambda row: {k: v for k, v in row.items() if "true_reward" not in k})
    text = Tags(page(folder)).text
    assert "The win rate against the initial policy rose from 50 % to 79 % (95 % interval of the" in text
    assert "16 to 41 points)" in text
    assert "Not shown: True reward (no true reward is known" in text and "Win rate against KL" in text


def test_a_run_stopped_at_step_three(run, tmp_path):
    folder = with_rows(run, tmp_path, lambda row: row if row["step"] <= 3 else None)
    status = {"state": "stopped", "step": 3, "total_steps": 200, "seconds": 3.14, "message": "ctrl-c"}
    write_json(folder / "status.json", status)
    samples = [row for row in read_lines(folder / "samples.jsonl") if row["step"] == 0]
    write_lines(folder / "samples.jsonl", samples)
    text = Tags(page(folder)).text
    assert "Stopped early at step 3 of 200. True reward was" in text
    assert "there is no evaluation to compare with" in text
    assert "only step 0 was measured, and a curve needs two" in text
    assert "Replies at step 0; there is no later evaluation" in text and "3.1 s" in text
    write_json(folder / "status.json", status | {"state": "failed", "message": "six skipped steps"})
    text = Tags(page(folder)).text
    assert "The run failed. six skipped steps" in text and "Failed at step 3 of 200." in text


def test_nulls_and_nans_are_left_out_of_curves(run, tmp_path):
    def spoil(row):
        if row["step"] % 7 == 0:
            row |= {"loss": None, "grad_norm": float("nan"), "kl": float("inf"), "tokens": "many", "lr": True}
        return row

    html = page(with_rows(run, tmp_path, spoil))
    coordinates = " ".join(re.findall(r'(?:points|d|cx|cy|x|y)="([^"]*)"', html))
    assert "nan" not in coordinates and "inf" not in coordinates
    assert "The loss was not a number" in html


def test_a_missing_directory_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path / "nowhere")


def test_the_report_is_replaced_atomically(run, tmp_path, monkeypatch):
    folder = with_rows(run, tmp_path, lambda row: row)
    old = page(folder)
    inode = (folder / "report.html").stat().st_ino
    assert page(folder) == old, "the same contents give the same bytes"
    assert (folder / "report.html").stat().st_ino != inode, "a new file took the name"

    def full(self, data):
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == old
    assert [path.name for path in folder.glob("*report*")] == ["report.html"], "no draft is left behind"


def test_the_verdict_has_the_numbers():
    rows = two_evals(true_reward=(0.41, 1.83), kl=(0.0, 3.2), length=(18.0, 22.3))
    rows.append({"step": 100, "split": "train", "tokens": 123_000, "loss": 0.3})
    assert verdict(rows, {"state": "finished", "seconds": 84.0}) == (
        "True reward rose from 0.41 to 1.83 at a KL of 3.2 nats; replies grew from 18.0 to 22.3 tokens; "
        "84 s, 123k tokens."
    )


def test_the_interval_of_the_difference():
    rows = two_evals(true_reward=(0.0, 1.0), true_reward_low=(-0.3, 0.6), true_reward_high=(0.3, 1.4))
    assert difference_interval(tidy(rows, "eval"), "true_reward") == pytest.approx((0.5, 1.5))
    assert "(95 % interval of the difference 0.50 to 1.50)" in verdict(rows, {})
    gains = [0.8, 0.9, 1.0, 1.1, 1.2]
    samples = [{"step": 0, "id": i, "reward": 3.0 * (i - 2)} for i in range(5)]
    samples += [{"step": 100, "id": i, "reward": 3.0 * (i - 2) + gains[i]} for i in range(5)]
    half = 2.776 * stdev(gains) / math.sqrt(5)  # Student's t, four degrees of freedom
    paired = difference_interval(tidy(rows, "eval"), "true_reward", samples)
    assert paired == pytest.approx((1 - half, 1 + half), rel=0.01)
    other = [s | {"reward": 9.0} for s in samples]  # not what the metrics were made from
    assert difference_interval(tidy(rows, "eval"), "true_reward", other)[0] == pytest.approx(0.5)


def test_the_verdict_does_not_call_noise_a_gain():
    rows = two_evals(true_reward=(1.0, 1.1), true_reward_low=(0.8, 0.9), true_reward_high=(1.2, 1.3))
    assert "stayed level within noise, from 1.00 to 1.10" in verdict(rows, {})
    assert "fell from 0.80 to 0.50" in verdict(two_evals(true_reward=(0.8, 0.5)), {})


def test_the_verdict_of_training_rows_only():
    rows = [{"step": s, "split": "train", "loss": 1.0 / s, "seconds": 10.0 * s} for s in (1, 2, 4)]
    assert verdict(rows, {"state": "running", "step": 4, "total_steps": 9}) == (
        "Still running at step 4 of 9. Training loss went from 1.000 to 0.250; nothing was evaluated; 40 s."
    )


def test_alarms_show_in_the_banner_and_the_section(run, tmp_path):
    def displace(row):
        if row["split"] == "eval":
            row |= {"logp/chosen": -20 - row["step"] / 20, "logp/rejected": -22 - row["step"] / 10}
        return row | ({"length": 18 + row["step"] / 20} if "length" in row else {})

    seen = Tags(page(with_rows(run, tmp_path, displace)))
    links = [attributes["href"] for _, attributes in seen.tags if "href" in attributes]
    assert links == ["#alarms", "reading-your-run.html#likelihood-displacement", "reading-your-run.html#length-exploitation"]
    assert "alarms" in {attributes.get("id") for _, attributes in seen.tags}
    assert (tmp_path / "edited" / "reading-your-run.html").read_bytes() == GUIDE.read_bytes(), "links lead to a file in the run folder"
    assert "2 alarms: Chosen replies became less likely; replies grew much longer" in seen.text
    assert "fell by 10.0 nats, that of rejected ones by 20.0. Any margin grew only because" in seen.text


def test_samples_are_in_order_and_the_extremes_are_the_extremes(run):
    rows = read_lines(run / "samples.jsonl")
    cards = sample_cards(rows)
    assert [card["id"] for card in cards["cards"]] == list(range(run_report.FIRST_SAMPLES))
    gain = {row["id"]: -row["reward"] for row in rows if row["step"] == 0}
    for row in rows:
        if row["step"] == 200:
            gain[row["id"]] += row["reward"]
    assert [(tag, card["id"]) for tag, card in cards["extremes"]] == [
        ("Largest gain", max(gain, key=gain.get)),
        ("Largest loss", min(gain, key=gain.get)),
    ]
    unrated = sample_cards([row | {"reward": None} for row in rows])
    assert len(unrated["cards"]) == run_report.FIRST_SAMPLES and not unrated["extremes"]


def test_numbers_as_text():
    shown = " ".join(number(v) for v in (0.0, 1.834, -0.41, 12.34, 123.4, 123456, 0.0123, 5e-5, -0.0001))
    assert shown == "0 1.83 −0.41 12.3 123 123k 0.012 5e−5 −1e−4"
    assert number(-0.001, 2) == "0.00"
    assert " ".join(compact(v) for v in (999, 9999, 12345, 999_950, 4_200_000)) == "999 9999 12.3k 1M 4.2M"
    assert [duration(s) for s in (3.14, 84, 725, 12000)] == ["3.1 s", "84 s", "12 min 5 s", "3 h 20 min"]


def test_resumed_rows_replace_the_earlier_ones():
    written = ((1, 1.0), (2, 2.0), (3, 9.0), (2, 2.5), (3, 3.5))
    rows = [{"step": s, "split": "train", "loss": v} for s, v in written]
    assert [row["loss"] for row in tidy(rows, "train")] == [1.0, 2.5, 3.5]


def test_thinning_keeps_spikes_and_smoothing_keeps_lines():
    curve = [(float(i), float(i == 4321)) for i in range(10_000)]
    thinned = thin(curve)
    assert len(thinned) < 500 and (4321.0, 1.0) in thinned
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)
    line = [(float(i), 2.0 * i) for i in range(200)]
    assert [y for _, y in smooth(line)[5:-5]] == pytest.approx([y for _, y in line[5:-5]])


@pytest.mark.parametrize("values", [[5.0, 5.0], [0.0, 0.0], [1e-12, 3e7], [-1e29, 1e29], [1e-8, 1e-8]])
@pytest.mark.parametrize("log", [False, True])
def test_any_numbers_can_be_drawn(values, log):
    svg = chart([Series("a", list(enumerate(values, 1)))], title="t", unit="u", log=log)
    assert not re.search(r"nan|inf", svg) and not Tags(svg).stack


def test_axes_are_labelled_with_their_values():
    svg = chart([Series("", [(1, 0.02), (2, 300.0)])], title="t", unit="u", log=True)
    assert re.findall(r'"end">([^<]*)</text>', svg)[:4] == ["0.1", "1", "10", "100"]
    svg = chart([Series("", [(1, 0.0), (2, 2e-4)])], title="t", unit="u")
    assert re.findall(r'"end">([^<]*)</text>', svg)[:3] == ["0", "0.5e−4", "1e−4"]


def test_curve_names_do_not_overlap():
    series = [Series(name, [(0, 0), (1, 1 + i / 1000)]) for i, name in enumerate("abcd")]
    svg = chart(series, title="t", unit="u")
    places = sorted(float(y) for y in re.findall(r'class="name[^"]*" x="[^"]*" y="([^"]*)"', svg))
    assert all(b - a > 13 for a, b in zip(places, places[1:], strict=False))
