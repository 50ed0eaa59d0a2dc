"""Everything a reader must know before believing a comparison, one sentence each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from prefopt.report import speed
from prefopt.report.alarms import alarms
from prefopt.report.compare_results import Results
from prefopt.report.compare_runs import Method, Run, dig
from prefopt.report.plots import compact, finite

FEW_PROMPTS = 30
PEAKS_APART = 1.05  # of measured ones, which a busy machine lowers
TOKENS_APART = 1.05  # seeds alone change the number of tokens by less


def caveats(results: Results) -> list[str]:
    checks = (_seeds, _unfinished, _alarms, _data, _models, _rewards, _efforts, _settings, _selection)
    return [line for check in checks for line in check(results)] + results.remarks


def _seeds(results: Results) -> list[str]:
    lines = []
    one = [m for m in results.methods if len(m.seeds) == 1]
    two = [m for m in results.methods if len(m.seeds) == 2]
    if one:
        which = _named(one, results)
        lines.append(f"One seed only: {which}. Intervals and tests cover the choice of prompts, not what another seed would give.")
    if two:
        lines.append(f"Two seeds only: {_named(two, results)}. They say little about the spread between seeds.")
    counts = sorted({len(m.seeds) for m in results.methods})
    if len(counts) > 1:
        each = "; ".join(f"{n} of {_named([m for m in results.methods if len(m.seeds) == n], results)}" for n in counts)
        lines.append(f"Methods have different numbers of seeds ({each}): how wide their intervals are cannot be compared.")
    for method in results.methods:
        doubled = [str(s) for s in method.seeds if sum(run.seed == s for run in method.runs) > 1]
        if doubled:
            lines.append(f"{method.label} has several runs of seed {', '.join(doubled)} with other results; they are averaged as one seed.")
    if 0 < results.prompts < FEW_PROMPTS:
        lines.append(f"Only {count(results.prompts, 'prompt')} were sampled at each evaluation; intervals from so few are rough.")
    return lines


def _named(methods: Sequence[Method], results: Results) -> str:
    if len(methods) == len(results.methods) > 1:
        return "all methods"
    return ", ".join(m.label for m in methods) if len(methods) <= 6 else f"{len(methods)} methods"


def _unfinished(results: Results) -> list[str]:
    lines = []
    for run in results.runs:
        if run.state == "finished":
            continue
        step, total = run.status.get("step"), run.status.get("total_steps")
        where = f" at step {step} of {total}" if step is not None else ""
        lines.append(f"{run.name} did not finish: {run.state}{where}; its figures are those of step {run.step:.0f}.")
    cut = [m for m in results.methods if len({run.step for run in m.runs}) > 1]
    if cut:
        lines.append(f"Runs of {_named(cut, results)} end at different steps; the curves go as far as all of them do.")
    return lines


def _alarms(results: Results) -> list[str]:
    rung = {run.name: [alarm.title for alarm in alarms(run.rows)] for run in results.runs}
    lines = []
    for title in dict.fromkeys(t for titles in rung.values() for t in titles):
        counts = {m.label: (sum(title in rung[run.name] for run in m.runs), len(m.runs)) for m in results.methods}
        where = [f"{label} ({n} of {count(total, 'run')})" for label, (n, total) in counts.items() if n]
        lines.append(f"Alarm “{title}”: {', '.join(where)}. The table of runs says which.")
    return lines


def _data(results: Results) -> list[str]:
    lines = []
    if results.data_differs:
        lines.append(f"The runs are over different data, compared because it was asked for: {'; '.join(results.data_differs)}.")
    if not results.paired:
        lines.append("The runs answered different prompts: differences are not paired by prompt, and there is no head-to-head win rate.")
    if len({len(run.samples[run.step]) for run in results.runs if run.ids}) > 1:
        which = f"the {results.prompts} that all answered" if results.paired else f"the first {results.prompts} of each"
        lines.append(f"The runs answered different numbers of prompts; {which} are used.")
    return lines


def _models(results: Results) -> list[str]:
    def differ(key: str, where: Callable[[Run], dict]) -> bool:
        return len({str(v) for run in results.runs if (v := dig(where(run), key)) is not None}) > 1

    def manifest(run: Run) -> dict:
        return run.manifest

    def config(run: Run) -> dict:
        return run.config

    lines = []
    if differ("model.fingerprint", manifest) or differ("model.name", config) or differ("model.path", config):
        lines.append("The runs start from different models: win rates and KL are each relative to their own initial policy.")
    if differ("tokenizer_sha256", manifest):
        lines.append("The tokenizers differ, so token counts and reply lengths are in different units.")
    if differ("reference.policy", config):
        lines.append("reference.policy differs: KL is taken to different policies.")
    if any(differ(f"packages.{p}", manifest) for p in ("prefopt", "torch", "transformers")) or differ("git.commit", manifest):
        lines.append("The runs were made with different versions of the code (see their manifests).")
    if any(differ(key, manifest) for key in ("device", "machine", "threads", "processes", "platform")):
        lines.append("The runs were made on different hardware or threads, so their times, speeds, MFU and memory cannot be compared "
                     f"({hardware_line(results)}).")
    peaks = [p for run in results.runs if (p := finite(dig(run.manifest, "peak.tflops")))]
    if peaks and max(peaks) > PEAKS_APART * min(peaks):
        low, high = (f"{1000 * p:.3g}" for p in (min(peaks), max(peaks)))
        lines.append(f"MFU is a share of different peaks ({low} to {high} GFLOP/s, see the manifests), so it cannot be compared; "
                     "hardware.peak_tflops sets one for all.")
    return lines


def hardware_line(results: Results) -> str:
    """Which machine each method ran on, in words."""
    found = {m.letter: sorted({speed.hardware(run.manifest) or "hardware unknown" for run in m.runs}) for m in results.methods}
    kinds = list(dict.fromkeys(" and ".join(names) for names in found.values()))
    if len(kinds) == 1:
        return f"hardware: {kinds[0]}"
    each = (f"{' '.join(letter for letter, names in found.items() if ' and '.join(names) == kind)}: {kind}" for kind in kinds)
    return f"hardware differs: {'; '.join(each)}"


def _rewards(results: Results) -> list[str]:
    """Which reward stands in the samples: the evaluations say under which name its mean was written."""
    learned = [run for run in results.runs if run.values("true_reward") is not None and not any("true_reward" in r for r in run.evals)]
    if not learned:
        return []
    if len(learned) < sum(run.values("true_reward") is not None for run in results.runs):
        return ["Some runs were judged by a known reward, others by a reward model: their rewards and win rates cannot be compared."]
    return ["No true reward is known: what is called so here, and win rates, are a reward model's opinion, which a policy that was trained "
            "against it can please without being better."]


def _efforts(results: Results) -> list[str]:
    lines = []
    budgets = sorted({run.figure("samples") or 0.0 for run in results.runs})
    if len(budgets) > 1 and budgets[0] == 0:
        lines.append(f"Some methods learnt from stored replies alone, others had up to {budgets[-1]:.0f} replies of their own judged: "
                     "not an equal budget.")
    if len([n for n in budgets if n]) > 1:
        own = [n for n in budgets if n]
        lines.append(f"The runs sampled different numbers of replies to learn from ({own[0]:.0f} to {own[-1]:.0f}): not an equal budget.")
    steps = {n for run in results.runs if (n := finite(run.status.get("total_steps"))) is not None}
    if len(steps) > 1:
        lines.append(f"The runs were given different numbers of steps ({', '.join(f'{n:.0f}' for n in sorted(steps))}).")
    tokens = [t for run in results.runs if (t := run.figure("tokens"))]
    if tokens and max(tokens) > TOKENS_APART * min(tokens):
        lines.append(f"The runs were trained on different numbers of tokens ({compact(min(tokens))} to {compact(max(tokens))}).")
    return lines


def _settings(results: Results) -> list[str]:
    keys = ("sampler.temperature", "sampler.top_p", "sampler.max_new_tokens", "sampler.steps", "sampler.guidance", "model.guidance")
    differing = [key for key in keys if len({dig(run.config, key) for run in results.runs}) > 1]
    return [f"{', '.join(differing)} differ, so the samples were not drawn in the same way."] if differing else []


def _selection(results: Results) -> list[str]:
    tried = Counter(tuple(str(dig(method.runs[0].config, key)) for key in ("algo.name", "model.name")) for method in results.methods)
    many = [f"{algo} ({count})" for (algo, _), count in tried.items() if count > 1]
    if not many:
        return []
    return [f"Several settings of one algorithm: {', '.join(many)}. The best of several, picked on these prompts, looks better than it is."]


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
