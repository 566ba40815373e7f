"""Training for minutes instead of epochs, with a clock on which each step takes a second."""

import itertools
import json
import os
import signal

import fake_runs
import pytest
import torch

import data
import main
import plot_result
import utils
from training import checkpoints, progress, trainer
from training.budget import Budget
from training.optimizers import lr_factor_by_clock
from training.run_record import RunRecord

OPTIONS = [
    *("--dataset", "digits", "--model", "vit_micro", "--img_size", "8", "--patch_size", "2"),
    *("--device", "cpu", "--batch_size", "128", "--lr", "2e-3", "--dropout", "0"),
]
# 30 steps; an epoch has 12.
HALF_A_MINUTE = ["--minutes", "0.5", "--mix", "0.5", "--mix_off", "0.5", "--warmup_fraction", "0.2"]
OF_HALF_A_MINUTE = [12, 12, 6]  # steps, or seconds


def run(output, *arguments):
    return main.main([*OPTIONS, "--output_dir", str(output), *(arguments or HALF_A_MINUTE)])


def folder_of(output):
    return output / "digits" / "full" / "seed_0"


def rows_of(output):
    return utils.read_json_lines(folder_of(output) / utils.METRICS)


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture(autouse=True)
def losses(monkeypatch):
    """The summed loss of each step; a step takes a second, everything else takes no time."""
    return slow_down(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where a run went that was not stopped."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        slow_down(monkeypatch)
        assert run(output) == 0
    return output


def slow_down(monkeypatch):
    clock, losses, loss_of = Clock(), [], trainer.Trainer.loss_of

    def step(self, *batch):
        clock.now += 1
        loss, hits = loss_of(self, *batch)
        losses.append(loss.item())
        return loss, hits

    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(trainer.Trainer, "loss_of", step)
    return losses


def lr_after(seconds):
    return 2e-3 * lr_factor_by_clock(seconds / 30, 0.2, step=seconds)


def test_a_run_trains_until_the_time_is_up(tmp_path, losses, capsys):
    assert run(tmp_path) == 0
    rows = rows_of(tmp_path)
    num_images = len(data.load_dataset("digits", "", (8, 8), torch.device("cpu")).train)

    assert len(losses) == 30
    assert [row["train_seconds"] for row in rows] == OF_HALF_A_MINUTE
    assert [row["step"] for row in rows] == [12, 24, 30]
    assert [row["train_images"] for row in rows] == [num_images, num_images, 6 * 128]
    assert [row["lr"] for row in rows] == pytest.approx([lr_after(12), lr_after(24), 0], abs=1e-9)
    assert [row["train_images_per_second"] for row in rows[1:]] == pytest.approx(
        [num_images / 12, 128], rel=0.02
    )
    assert rows[2]["train_loss"] == pytest.approx(sum(losses[24:]) / (6 * 128), rel=1e-5)
    assert 10 < rows[2]["train_accuracy"] <= 100

    summary = utils.read_json(folder_of(tmp_path) / utils.SUMMARY)
    assert summary["final"]["step"] == 30
    assert summary["train_images_per_second"] == pytest.approx((num_images + 768) / 18, rel=0.02)
    assert "\nepoch 3 | train loss" in capsys.readouterr().out

    assert run(tmp_path) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_schedule_by_the_clock():
    shares = [0, 0.05, 0.1, 0.55, 1]
    factors = [lr_factor_by_clock(share, 0.1, step=1000) for share in shares]
    assert factors == pytest.approx([0.01, 0.5, 1, 0.5, 0])
    assert lr_factor_by_clock(0, 0, step=0) == 1


def test_a_first_step_that_takes_long_does_not_skip_the_warmup():
    """It may compile for a minute."""
    factors = [lr_factor_by_clock(0.11, 0.1, step) for step in (0, 1, 4)]
    assert factors == pytest.approx([0.1, 0.2, 0.5])
    assert lr_factor_by_clock(0, 0.1, step=0) > 0


def test_images_are_not_mixed_in_the_last_share_of_the_time(tmp_path, monkeypatch):
    mixed = []
    train_batches = data.train_batches

    def note(*, augmentation, **arguments):
        mixed.append(augmentation.mix)
        return train_batches(augmentation=augmentation, **arguments)

    monkeypatch.setattr(data, "train_batches", note)
    assert run(tmp_path) == 0
    assert mixed == [0.5, 0.5, 0]  # they begin after 0, 12 and 24 of 30 seconds

    by_epochs = [Budget(epochs=10).is_mixed(epoch, 1e9, 0.25) for epoch in range(1, 11)]
    assert by_epochs == [True] * 8 + [False] * 2


STOPS = (1, 11, 12, 13, 24, 29, 30)


@pytest.mark.parametrize("num_steps", STOPS)
def test_the_time_before_a_stop_counts_and_the_resumed_run_is_the_same(
    tmp_path, monkeypatch, losses, whole, num_steps
):
    train_step, count = trainer.Trainer.train_step, itertools.count(1)

    def stopping(self, *batch):
        train_step(self, *batch)
        if next(count) == num_steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.Trainer, "train_step", stopping)
    assert run(tmp_path) == utils.EXIT_AGAIN
    assert len(losses) == num_steps
    assert run(tmp_path) == 0
    assert len(losses) == 30
    assert rows_without_speed(tmp_path) == rows_without_speed(whole)
    assert_same_weights(tmp_path, whole)


def test_stopped_in_the_last_evaluation(tmp_path, monkeypatch, losses):
    evaluate, count = trainer.Trainer.evaluate, itertools.count(1)

    def stopping(self):
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self)

    monkeypatch.setattr(trainer.Trainer, "evaluate", stopping)
    assert run(tmp_path) == utils.EXIT_AGAIN
    assert len(rows_of(tmp_path)) == 2
    assert run(tmp_path) == 0
    assert len(losses) == 30
    assert [row["train_seconds"] for row in rows_of(tmp_path)] == OF_HALF_A_MINUTE


def test_all_processes_go_by_the_times_of_the_first(tmp_path, monkeypatch):
    """Else some would mix the images of an epoch, and others would not."""

    def of_another_process(value):
        is_row = isinstance(value, dict) and "train_seconds" in value
        return value | {"train_seconds": 11.0} if is_row else value

    monkeypatch.setattr(trainer.distributed, "from_first", of_another_process)
    assert run(tmp_path) == 0
    assert {row["train_seconds"] for row in rows_of(tmp_path)} == {11.0}


def rows_without_speed(output):
    measured = ("eval_images_per_second", "epoch_seconds", "peak_memory_bytes")
    # A resumed process begins its count of ordinary steps anew.
    measured += ("train_images_per_second", "compile_seconds")
    return [
        {key: value for key, value in row.items() if key not in measured} for row in rows_of(output)
    ]


def assert_same_weights(output, other):
    one, two = (
        checkpoints.load_checkpoint(folder_of(path) / "last.pt")["model"]
        for path in (output, other)
    )
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_time_that_is_up_within_the_first_epoch(tmp_path, losses):
    assert run(tmp_path, "--minutes", "0.05") == 0
    (row,) = rows_of(tmp_path)
    assert row["step"] == len(losses) == 3
    assert row["train_images"] == 3 * 128
    assert row["train_loss"] == pytest.approx(sum(losses) / (3 * 128), rel=1e-5)


# --------------------------------------------------------------------------------------------------
# What the user sees


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "5", "--epochs", "3"], "--epochs 3 and --minutes 5 both say how long"),
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
    ],
)
def test_bad_minutes(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        utils.run_cli(lambda: run(tmp_path, *arguments))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "digits").exists()


def test_the_resolved_settings(tmp_path, capsys):
    run(tmp_path, "--minutes", "20", "--dry_run")
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["epochs"], settings["minutes"]) == (None, 20)

    run(tmp_path, "--dry_run")
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["epochs"], settings["minutes"]) == (50, None)


def test_another_time_is_another_run(tmp_path):
    run(tmp_path)
    with pytest.raises(utils.UsageError, match=r"minutes 0\.5 there, 0\.6 asked for"):
        run(tmp_path, *HALF_A_MINUTE, "--minutes", "0.6")


def test_the_report_says_how_long(tmp_path):
    for seed in (0, 1):
        fake_runs.write_run(tmp_path, seed=seed, epochs=None, minutes=20.0)
        fake_runs.write_run(tmp_path, "2d_cardinal", 1, seed, epochs=None, minutes=20.0)
    plot_result.main(["--results_path", str(tmp_path / "digits")])
    assert "20 minutes of training" in (tmp_path / "digits" / "results.md").read_text()


def test_a_record_needs_either(tmp_path):
    folder = fake_runs.write_run(tmp_path, epochs=None)
    with pytest.raises(utils.UserError, match="neither epochs nor minutes"):
        RunRecord.read(folder)
