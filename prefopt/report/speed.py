"""How fast a run was: its figures, from what `status.json` says of the whole run, and its curves, from the rows of metrics.jsonl."""

from __future__ import annotations

from prefopt.report import time_split
from prefopt.report.plots import Group, Row, Series, finite, number, points, smooth

GB = 1e9
COUNTED = ("tokens", "pictures")  # of a row; a picture counts at each draw of noise that it is scored at


def averages(status: dict) -> dict[str, float]:
    """The run's averages that are known: `rows_per_second`, `tokens_per_second` or `pictures_per_second`, `useful_mfu`,
    `hardware_mfu`, `padding`, `peak_memory`."""
    found = status.get("speed")
    return {key: n for key, value in found.items() if (n := finite(value)) is not None} if isinstance(found, dict) else {}


def unit(status: dict) -> str:
    """What a row of the data is: pairs, completions, prompts or rows."""
    found = status.get("speed")
    return str(found.get("unit") or "rows") if isinstance(found, dict) else "rows"


def hardware(manifest: dict) -> str:
    """The machine in a few words: `2 x NVIDIA H200`, `AMD EPYC, 4 threads`. Empty where the manifest does not say."""
    name, processes, threads = manifest.get("machine"), finite(manifest.get("processes")), finite(manifest.get("threads"))
    if not name:
        return ""
    cpu = str(manifest.get("device") or "").startswith("cpu")
    said = f"{processes:.0f} × {name}" if processes and processes > 1 and not cpu else str(name)
    if cpu and processes and processes > 1:
        said += f", {processes:.0f} processes"
    return said + (f", {threads:.0f} thread{'s' if threads != 1 else ''}" if cpu and threads else "")


def peak(manifest: dict) -> str:
    """What MFU is a share of, in words; empty where it is unknown."""
    found = manifest.get("peak")
    tflops = finite(found.get("tflops")) if isinstance(found, dict) else None
    if tflops is None:
        return ""
    size = f"{number(tflops)} TFLOP/s" if tflops >= 1 else f"{number(1000 * tflops)} GFLOP/s"
    each = " for each process" if (finite(manifest.get("processes")) or 1) > 1 else ""
    return f"{size}{each} ({found.get('from') or 'source unknown'})"


def figures(status: dict, manifest: dict) -> list[dict[str, str]]:
    """The tiles."""
    known, rows = averages(status), unit(status)
    tiles = []
    if "rows_per_second" in known:
        each = [f"{number(known[f'{what}_per_second'])} {what}/s" for what in COUNTED if f"{what}_per_second" in known]
        note = " ".join(each)
        tiles.append(_tile(f"{rows.capitalize()} per second", number(known["rows_per_second"]), note))
    if "useful_mfu" in known:
        note = f"hardware MFU {number(100 * known['hardware_mfu'], 0)} %" if "hardware_mfu" in known else ""
        tiles.append(_tile("Useful MFU", number(100 * known["useful_mfu"], 0), note, "%"))
    if "padding" in known:
        tiles.append(_tile("Padding", number(100 * known["padding"], 0), "of the positions computed", "%"))
    if "peak_memory" in known:
        where = "process" if str(manifest.get("device") or "").startswith("cpu") else "GPU"
        tiles.append(_tile("Peak memory", number(known["peak_memory"] / GB), f"of a {where}, evaluation included", "GB"))
    return tiles


def _tile(title: str, after: str, note: str, unit: str = "") -> dict[str, str]:
    return {"title": title, "before": "", "after": after, "unit": unit, "note": note}


def group(train: list[Row], status: dict, manifest: dict) -> Group:
    """The curves."""
    machine, against, rows = hardware(manifest), peak(manifest), unit(status)
    pictures = any("pictures_per_second" in row for row in train)
    lost = "" if pictures else "padding, masked attention, "
    steps = averages(status).get("steps")
    intro = ["Each point looks back on the last 20 steps; evaluations and checkpoints do not count."]
    if steps:
        intro.append(f"The averages at the top are over {steps:.0f} steps, without the first two of each start, which compile and warm up.")
    intro += [f"Machine: {machine}."] if machine else []
    intro += [f"Its peak: {against}."] if against else []
    out = Group("Speed", " ".join(intro))
    out.add(f"{rows.capitalize()} per second", [Series("", points(train, "rows_per_second"))], "Trained on, over all processes.",
            "no speed was recorded", unit=f"{rows}/s")
    if pictures:
        out.add("Pictures per second", [Series("", points(train, "pictures_per_second"))], "Each at each draw of noise that it is scored "
                "at, over all processes.", "no speed was recorded", unit="pictures/s")
    curves = [_share(train, "useful_mfu", "useful", 1), _share(train, "hardware_mfu", "hardware", 2)]
    out.add("Share of the machine’s peak", curves, f"Model FLOPs utilisation. Between the curves lie {lost}recomputation and a reference "
            "that is run along.", "the FLOPs of this model are not known", unit="MFU, %")
    if not pictures:
        out.add("Padding", [_share(train, "padding", "", 1)], "Share of the positions computed that hold no token.",
                "no padding was recorded", unit="%")
    memory = [(step, held / GB) for step, held in points(train, "peak_memory")]
    out.add("Peak memory", [Series("", memory)], "Most that any process has held so far, evaluations included.", "no memory was recorded",
            unit="GB")
    time_split.add(out, status)
    return out


def _share(train: list[Row], key: str, label: str, colour: int) -> Series:
    return Series(label, smooth([(step, 100 * share) for step, share in points(train, key)]), colour)

