"""The clock of a step, the sums over processes, who is named, and the picture in the report."""

from __future__ import annotations

import pytest
import torch

from prefopt.config.schema import OptimConfig
from prefopt.objectives.reference_free import SimPO
from prefopt.report.plots import Group
from prefopt.report.time_split import SHOWN, add
from prefopt.training import timing
from prefopt.training.engine import Engine
from prefopt.training.timing import ENOUGH, PARTS, WARM_UP, Clock, Times, straggler_lines
from tests import toy
from tests.toy_runs import fresh_accelerator


@pytest.fixture
def clock(monkeypatch):
    """A clock whose time is set by hand: `clock.at = seconds`."""
    made = Clock(torch.device("cpu"))
    made.at = 0.0
    monkeypatch.setattr(made, "now", lambda: made.at)
    return made


def test_the_time_of_inner_parts_is_not_that_of_outer_ones(clock):
    with clock("backward"):
        clock.at = 1.0
        with clock("communication"):
            clock.at = 3.0
        clock.at = 3.5
        with clock("communication"):
            clock.at = 4.0
        clock.at = 6.0
    with clock("optimizer"):
        clock.at = 6.5
    found = clock.lap()
    assert found == {"data": 0, "forward": 0, "backward": 3.5, "communication": 2.5, "optimizer": 0.5, "checkpoint": 0}
    assert sum(clock.lap().values()) == 0  # a lap begins anew


def test_what_is_left_of_a_backward_pass_when_gradients_are_ready_is_waiting(clock):
    with clock("backward"):
        clock.at = 2.0
        clock.ready = clock.now()
        clock.at = 2.75
    found = clock.lap()
    assert (found["backward"], found["communication"]) == (2.0, 0.75)


def test_an_evaluation_is_no_part_of_a_step(clock):
    with clock.pause(), clock("forward"):
        clock.at = 5.0
    assert sum(clock.lap().values()) == 0


def test_calls_and_their_handles_are_timed(clock):
    class Work:
        done = True

        def wait(self):
            clock.at += 2.0

    def send(tensor):
        clock.at += 1.0
        return Work()

    handle = clock.timed(send)(torch.zeros(1))
    handle.wait()
    assert handle.done and clock.lap()["communication"] == 3.0


def laps(*own: float) -> list[list[float]]:
    """A lap in which each process works so long forward, and the rest of the longest time waits."""
    return [[0.0, seconds, 0.0, max(own) - seconds, 0.0, 0.0] for seconds in own]


def test_a_process_that_keeps_others_waiting_is_named_after_many_steps():
    times = Times(4, 2)
    assert times.add([[0.0] * len(PARTS)] * 4) == {}  # before the first lap
    times.add(laps(9.0, 1.0, 1.0, 1.0))  # the first laps do not count
    for _ in range(ENOUGH + WARM_UP - 2):
        row = times.add(laps(1.0, 1.0, 1.05, 1.3))
    assert times.averages()["stragglers"] == []
    times.add(laps(1.0, 1.0, 1.05, 1.3))
    assert row["time/forward"] == pytest.approx(1.0875) and row["time_most/communication"] == pytest.approx(0.3)
    found = times.averages()
    assert found["stragglers"] == [3] and found["steps"] == ENOUGH
    assert found["seconds"][0][1] == pytest.approx(1.0)
    assert straggler_lines(found) == ["process 3 (process 1 of machine 1) takes 1.3 s a step for its own work, the others 1 s; they wait "
                                      "for it"]


def test_equal_processes_are_not_named_and_one_process_has_nobody_to_wait_for():
    for world in (1, 2, 3):
        times = Times(world, world)
        for _ in range(ENOUGH + WARM_UP):
            row = times.add(laps(*[1.0 + 0.1 * r for r in range(world)]))
        assert times.averages()["stragglers"] == [] and straggler_lines(times.averages()) == []
        assert ("time_most/data" in row) == (world > 1)


def test_the_report_shows_every_process_and_names_who_is_slow():
    times = Times(2, 2)
    for _ in range(ENOUGH + WARM_UP):
        times.add(laps(1.0, 2.0))
    group = Group("Speed", "")
    add(group, {"times": times.averages()})
    panel = group.panels[0]
    assert panel.svg.count('class="stack c2"') == 2 and panel.svg.count('class="stack c4"') == 1  # process 1 waits for nobody
    assert panel.caption.startswith("Process 1 takes 2.00 times as long as the others")
    many = Group("Speed", "")
    add(many, {"times": {"parts": list(PARTS), "seconds": laps(*[1.0 + 0.001 * r for r in range(100)]), "stragglers": []}})
    assert many.panels[0].svg.count('class="stack c2"') == SHOWN and "Of 100 processes" in many.panels[0].caption
    for broken in ({"times": {"parts": ["data"], "seconds": [[None]]}}, {"times": 3}, {}):
        none = Group("Speed", "")
        add(none, broken)
        assert not none.panels and bool(none.missing) == bool(broken)


def test_a_step_tells_where_the_time_of_the_one_before_went(tmp_path, monkeypatch):
    now = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))  # every look at the clock takes a second
    with fresh_accelerator() as accelerator:
        policy = toy.policy(toy.save_model(tmp_path / "model"))
        engine = Engine(policy, SimPO(), None, OptimConfig(), accelerator)
        micros = [toy.micro(policy, toy.pair()), toy.micro(policy, toy.pair(chosen="Is that so?"))]
        first, second = engine.step(micros, 1e-3), engine.step(micros, 1e-3)
    assert first.times == [[0.0] * len(PARTS)]
    assert dict(zip(PARTS, second.times[0], strict=True)) == {
        "data": 0, "forward": len(micros), "backward": len(micros), "communication": 0, "optimizer": 1, "checkpoint": 0}
