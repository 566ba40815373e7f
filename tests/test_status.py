"""What a sweep says while it runs: counts, and the time left as far as anybody can know."""

import io
import itertools
import os
import time

import pytest

import utils
from masks import MaskSpec
from sweep import status
from sweep.plan import DONE, ELSEWHERE, FAILED, RUNNING, Job, PlannedRun
from sweep.status import Pace, Status, format_duration, schedule


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return 1e9 + self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(status, "time", clock)
    return clock


class Sweep:
    """Jobs whose folders and states the test sets."""

    def __init__(self, root, clock, num_runs, num_slots, num_finished=0):
        self.clock = clock
        masks = [MaskSpec("2d_cardinal", step) for step in range(1, num_runs + 1)]
        self.plan = [PlannedRun(mask, 0, root / mask.run_name / "seed_0", ()) for mask in masks]
        self.jobs = [Job(run) for run in self.plan[num_finished:]]
        self.status = Status(self.plan, self.jobs, num_slots)

    def set(self, index, state, note=""):
        self.jobs[index].state, self.jobs[index].note = state, note
        self.status.on_change()

    def write(self, index, num_done, seconds=10.0, epochs=20):
        write_epochs(self.jobs[index].run, self.clock, num_done, seconds, epochs)

    @property
    def left(self):
        return self.status.forecast.seconds_left()


def write_epochs(run, clock, num_done, seconds=10.0, epochs=20):
    """A run that has just finished an epoch."""
    run.folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **{"mask_type": run.mask.mask_type, "expansion_step": run.mask.expansion_step},
        **{"run_name": run.mask.run_name, "seed": 0, "dataset": "digits", "epochs": epochs},
    }
    attention = {"num_neighbors_nominal": 5, "num_neighbors_mean": 4.5}
    config = {"format": 2, "settings": settings, "attention": attention, "provenance": {}}
    utils.write_json(run.folder / utils.CONFIG, config | {"data": {"label": "Digits"}})

    rows = [
        {"epoch": epoch, "epoch_seconds": seconds, "eval_accuracy": 50.0}
        for epoch in range(1, num_done + 1)
    ]
    utils.write_json_lines(run.folder / utils.METRICS, rows)
    os.utime(run.folder / utils.METRICS, (clock.time(), clock.time()))
    if num_done == epochs:
        summary = {"format": 2, "final": {}, "total_seconds": seconds * epochs}
        utils.write_json(run.folder / utils.SUMMARY, summary)


# --------------------------------------------------------------------------------------------------
# The time left


def test_nothing_is_said_while_nobody_can_know(tmp_path, clock):
    sweep = Sweep(tmp_path, clock, num_runs=3, num_slots=1)
    assert sweep.left is None
    sweep.set(0, RUNNING)
    clock.now += 100
    assert sweep.left is None


def test_from_the_pace_of_a_run_in_progress(tmp_path, clock):
    sweep = Sweep(tmp_path, clock, num_runs=1, num_slots=1)
    sweep.set(0, RUNNING)
    clock.now += 55  # it takes a moment to start
    sweep.write(0, num_done=5)
    assert sweep.left == pytest.approx(15 * 10)
    clock.now += 4
    assert sweep.left == pytest.approx(15 * 10 - 4)
    clock.now += 1000  # a slow epoch counts as one that ends now
    assert sweep.left == pytest.approx(14 * 10)
    sweep.write(0, num_done=20)
    assert sweep.left == 0


def test_from_how_long_a_finished_run_took(tmp_path, clock):
    """With its start, which its metrics don't tell."""
    sweep = Sweep(tmp_path, clock, num_runs=4, num_slots=1)
    sweep.set(0, RUNNING)
    clock.now += 250
    sweep.write(0, num_done=20)
    sweep.set(0, DONE)
    assert sweep.left == pytest.approx(3 * 250)
    sweep.set(1, RUNNING)
    clock.now += 100
    assert sweep.left == pytest.approx(3 * 250 - 100)
    clock.now += 200  # it takes longer than the other did, so there is no telling
    assert sweep.left is None
    sweep.set(1, FAILED)
    assert sweep.left == pytest.approx(2 * 250)


def test_runs_that_were_finished_before_tell_as_well(tmp_path, clock):
    for run in Sweep(tmp_path, clock, num_runs=3, num_slots=1).plan[:2]:
        write_epochs(run, clock, num_done=20, seconds=5 * run.mask.expansion_step)
    sweep = Sweep(tmp_path, clock, num_runs=3, num_slots=1, num_finished=2)
    assert sweep.left == pytest.approx((20 * 5 + 20 * 10) / 2)
    assert sweep.status.count() == "2 of 3 done, 0 running, 0 failed"


def test_a_run_of_the_same_mask_tells_more_than_others(tmp_path, clock):
    mask = MaskSpec("full")
    plan = [PlannedRun(mask, seed, tmp_path / f"full/seed_{seed}", ()) for seed in (0, 1)]
    other = MaskSpec("2d_cardinal", 1)
    plan.append(PlannedRun(other, 0, tmp_path / "2d/seed_0", ()))
    write_epochs(plan[0], clock, num_done=20, seconds=30)
    write_epochs(plan[2], clock, num_done=20, seconds=1)
    sweep = Status(plan, [Job(plan[1])], 1)
    assert sweep.forecast.seconds_left() == pytest.approx(20 * 30)


def test_a_resumed_run_has_only_its_rest_to_do(tmp_path, clock):
    sweep = Sweep(tmp_path, clock, num_runs=2, num_slots=1)
    sweep.write(0, num_done=15)
    sweep.write(1, num_done=10)
    clock.now += 86_400
    sweep.status = Status(sweep.plan, sweep.jobs, 1)  # of a sweep that starts a day later
    assert sweep.left == pytest.approx(5 * 10 + 10 * 10)
    sweep.set(0, RUNNING)  # nothing has passed of its next epoch
    assert sweep.left == pytest.approx(5 * 10 + 10 * 10)

    clock.now += 60
    sweep.write(0, num_done=20)
    sweep.set(0, DONE)  # after 60 s, which is not how long a whole run takes
    assert sweep.status.forecast.watched == {}
    assert sweep.left == pytest.approx(10 * 10)


def test_runs_elsewhere_take_no_slot(tmp_path, clock):
    sweep = Sweep(tmp_path, clock, num_runs=2, num_slots=1)
    sweep.write(0, num_done=10)
    sweep.write(1, num_done=15)
    sweep.set(0, ELSEWHERE)
    sweep.set(1, RUNNING)
    assert sweep.left == pytest.approx(10 * 10 - 0)


def test_on_a_cluster_as_many_run_at_a_time_as_now(tmp_path, clock):
    sweep = Sweep(tmp_path, clock, num_runs=4, num_slots=None)
    for index in range(4):
        sweep.write(index, num_done=10)
    assert sweep.left is None  # none runs
    sweep.set(0, RUNNING)
    sweep.set(1, RUNNING)
    assert sweep.left == pytest.approx(2 * 10 * 10)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("lengths", list(itertools.permutations([7, 1, 4, 3])))
def test_the_schedule_is_that_of_a_pool(num_slots, lengths):
    """Against a loop over time, in which each slot takes the next job as soon as it is free."""
    slots = [2, 0, 5][:num_slots]
    busy, waiting, now = list(slots), list(lengths), 0
    ends = list(slots)
    while waiting:
        for slot in range(num_slots):
            if busy[slot] <= now and waiting:
                busy[slot] = ends[slot] = now + waiting.pop(0)
        now += 1
    assert max(schedule(slots, lengths)) == max(ends)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 99}'])
def test_a_folder_that_cannot_be_read_is_no_error(tmp_path, text):
    (tmp_path / utils.CONFIG).write_text(text)
    assert Pace.read(tmp_path) == Pace()
    assert Pace.read(tmp_path / "nowhere") == Pace()


def test_metrics_without_times_tell_no_pace(tmp_path, clock):
    sweep = Sweep(tmp_path, clock, num_runs=1, num_slots=1)
    sweep.set(0, RUNNING)
    sweep.write(0, num_done=2, seconds=None)
    assert sweep.left is None


def test_many_runs_are_looked_at_fast(tmp_path):
    sweep = Sweep(tmp_path, time, num_runs=200, num_slots=8)
    for index in range(8):
        sweep.write(index, num_done=10, epochs=300)
        sweep.set(index, RUNNING)
    began = time.process_time()
    assert sweep.left > 0
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "10 s"),
        (44, "40 s"),
        (89, "90 s"),
        (91, "2 min"),
        (89 * 60, "89 min"),
        (100 * 60, "1 h 40 min"),
        (47 * 3600, "47 h 0 min"),
        (60 * 3600, "2.5 days"),
    ],
)
def test_durations_in_words(seconds, words):
    assert format_duration(seconds) == words


# --------------------------------------------------------------------------------------------------
# What is printed


def test_a_file_gets_a_line_at_each_change(tmp_path, clock, capsys):
    sweep = Sweep(tmp_path, clock, num_runs=3, num_slots=2)
    sweep.set(0, RUNNING, "started on the CPU")
    sweep.set(1, RUNNING, "started on the CPU")
    for _ in range(3):  # nothing changes
        sweep.status.on_poll()
        clock.now += 60
    sweep.write(0, num_done=20)
    sweep.set(0, DONE, "finished")
    sweep.set(1, FAILED, "FAILED with exit code 1")
    sweep.status.on_poll()
    assert capsys.readouterr().out.splitlines() == [
        "2d_cardinal_expansion_1 seed 0: started on the CPU",
        "2d_cardinal_expansion_2 seed 0: started on the CPU",
        "0 of 3 done, 2 running, 0 failed",
        "2d_cardinal_expansion_1 seed 0: finished",
        "2d_cardinal_expansion_2 seed 0: FAILED with exit code 1",
        "1 of 3 done, 0 running, 1 failed, about 3 min left",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """What is on the screen after it all."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part.removeprefix("\033[K") + ("" if part.startswith("\033[K") else shown)
            lines.append(shown)
        return lines


def test_a_terminal_has_one_line_that_is_rewritten(tmp_path, clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "110")
    sweep = Sweep(tmp_path, clock, num_runs=3, num_slots=2)
    sweep.set(0, RUNNING, "started on the CPU")
    sweep.status.on_poll()
    news = "2d_cardinal_expansion_1 seed 0: started on the CPU"
    live = "0 of 3 done, 1 running, 0 failed | 2d_cardinal_expansion_1 seed 0"
    assert terminal.screen() == [news, live]

    sweep.write(0, num_done=12)
    clock.now += 0.1
    sweep.status.on_poll()  # not yet again
    assert terminal.screen() == [news, live]
    clock.now += status.SECONDS_BETWEEN_LOOKS
    sweep.status.on_poll()
    # The others wait for a second slot and for this one: 200 s, or 80 s and then 200 s.
    live = "0 of 3 done, 1 running, 0 failed, about 5 min left | 2d_cardinal_expansion_1 seed 0"
    assert terminal.screen() == [news, f"{live}: epoch 12, 50.0%"]

    monkeypatch.setenv("COLUMNS", "40")
    clock.now += 2 * status.SECONDS_BETWEEN_LOOKS
    sweep.status.on_poll()
    assert terminal.screen() == [news, live[:39]]

    sweep.set(0, FAILED, "FAILED")
    sweep.status.clear()
    assert terminal.screen() == [news, "2d_cardinal_expansion_1 seed 0: FAILED", ""]


def test_nothing_is_left_at_the_end(tmp_path, clock, capsys):
    sweep = Sweep(tmp_path, clock, num_runs=1, num_slots=1)
    sweep.set(0, RUNNING)
    sweep.write(0, 20)
    sweep.set(0, DONE)
    sweep.status.on_poll()
    assert capsys.readouterr().out == "1 of 1 done, 0 running, 0 failed\n"
