"""`prefopt compare`: runs side by side, as a table for the terminal and one self-contained HTML page.

Runs that differ in nothing but the seed are one method (`compare_runs`). What is measured is in `compare_results`, how chance is treated
in `compare_stats`, what the reader is warned of in `compare_caveats`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from prefopt.errors import UserError, nearest
from prefopt.report.compare_page import page, table
from prefopt.report.compare_results import measure
from prefopt.report.compare_runs import Run
from prefopt.report.page import write_page

USAGE = "prefopt compare FOLDER... [--output FILE] [--different-data]"


def compare(folders: Sequence[Path], output: Path | None = None, allow_different_data: bool = False) -> tuple[str, Path]:
    """(table for the terminal, path of the page that was written) for the runs in and below `folders`."""
    results = measure([Path(f) for f in folders], allow_different_data)
    path = _place([Path(f) for f in folders], results.runs, output)
    try:
        write_page(path, page(results))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another file with --output") from error
    return table(results), path


def _place(folders: Sequence[Path], runs: Sequence[Run], output: Path | None) -> Path:
    """Where the page goes: `output`, else the sweep folder that holds all runs, else the current directory."""
    if output is not None:
        path = Path(output)
        path = path / "compare.html" if path.is_dir() else path
        if not path.parent.is_dir():
            raise UserError(f"--output {output}: there is no folder {path.parent}; make it, or name another file")
        return path
    common = Path(os.path.commonpath([run.folder.resolve().parent for run in runs]))
    given = {folder.resolve() for folder in folders}
    for folder in (common, *common.parents):
        if folder in given or (folder / "sweep.json").is_file():
            return folder / "compare.html"
    return Path("compare.html")


def main(argv: Sequence[str]) -> None:
    """The command line: prints the table, then where the page is."""
    folders, output, different, rest = [], None, False, list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--different-data":
            different = True
        elif word == "--output" or word.startswith("--output="):
            value = word.partition("=")[2] or (rest.pop(0) if word == "--output" and rest else "")
            if not value or value.startswith("--"):
                raise UserError(f"--output needs the name of a file: {USAGE}")
            output = Path(value)
        elif word.startswith("-"):
            raise UserError(f"prefopt compare does not know {word}{nearest(word, ('--output', '--different-data'))} ({USAGE})")
        else:
            folders.append(Path(word))
    if not folders:
        raise UserError(f"prefopt compare needs folders of runs or of sweeps: {USAGE}")
    text, path = compare(folders, output, different)
    print(f"{text}\n\ncomparison: {path}")
