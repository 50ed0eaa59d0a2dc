"""docs/extending.md does what it says: its blocks are run as they stand, and the class keeps what every objective owes."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import samples
import test_formulas
import test_gradients
import test_registration

from prefopt.config.docstring import LABELS, doc_parts
from prefopt.config.objective_source import read_objective

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"(?:`([\w./-]+)`:\n\n)?```(\w+)\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
FILES = {name: text for name, _, text in BLOCKS if name}


@pytest.fixture
def written(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_page_as_written(written):
    script = "".join(text for _, language, text in BLOCKS if language == "bash")
    command = f'prefopt() {{ "{sys.executable}" -m prefopt.cli "$@"; }}\n{script}'
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-euc", command], cwd=written, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (written / "runs" / "chipo" / "metrics.jsonl").read_text().splitlines()]
    judged = [row for row in rows if row["split"] == "eval"]
    assert judged[0]["loss"] == pytest.approx(math.log(2), rel=1e-5) and judged[-1]["loss"] < 0.65
    assert judged[0]["accuracy"] == 0.5 and judged[-1]["accuracy"] > 0.9
    assert "chipo" in (written / "runs" / "chipo" / "report.html").read_text()


def test_it_is_short():
    assert set(FILES) == {"chipo.py", "conf/algo/chipo.yaml"} and {language for _, language, _ in BLOCKS} == {"python", "yaml", "bash"}
    assert sum(bool(line.strip()) for _, _, text in BLOCKS for line in text.splitlines()) <= 42


def test_the_class_keeps_what_every_objective_owes(written, monkeypatch):
    """The tests that come with registration, as if the class and its file were in the repository."""
    monkeypatch.syspath_prepend(str(written))
    monkeypatch.setitem(samples.YAML, "chipo", written / "conf" / "algo" / "chipo.yaml")
    try:
        test_formulas.test_terms_equal_the_formula("chipo", 5)
        test_formulas.test_golden_number("chipo", 0)
        for index in range(2):
            test_formulas.test_limit("chipo", index)
        test_formulas.test_no_row_prefers_the_policy_at_the_start("chipo")
        test_gradients.test_gradient_matches_finite_differences("chipo")
        test_gradients.test_first_step_goes_the_right_way("chipo")
        test_gradients.test_extreme_scores_stay_finite_and_right("chipo")
        test_registration.test_yaml_states_every_field_and_nothing_else("chipo")
        test_registration.test_docstring_names_the_paper_and_the_equation("chipo")
        info = read_objective("chipo.ChiPO", ["chipo"])
        assert list(doc_parts(info.doc)[2]) == list(LABELS) and info.needs_reference
    finally:
        sys.modules.pop("chipo", None)
