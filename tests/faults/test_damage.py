"""Randomly damaged files: a reader either fails with one line or reads what was written."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
import victims

import eval as evaluation
import main
import plot_result
import utils
from masks import MaskSpec
from sweep import plan
from training import checkpoints


def damage(content: bytes, draws) -> bytes:
    """Cut the content off, change a byte, zero a stretch, or insert something."""
    kind, place = draws.integers(4), int(draws.integers(len(content)))
    if kind == 0:
        return content[:place]
    if kind == 1:
        changed = content[place] ^ int(draws.integers(1, 256))
        return content[:place] + bytes([changed]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + bytes(min(512, len(content) - place)) + content[place + 512 :]
    return content[:place] + draws.bytes(20) + content[place:]


def with_odd_value(content: bytes, draws) -> bytes:
    """A JSON object in which one value, at any depth, is replaced or missing."""
    odd = [None, True, -1, 1e308, 10**400, "", "x", [], ["x"], {}, {"x": 1}]
    within = whole = json.loads(content)
    while True:
        keys = list(within) if isinstance(within, dict) else range(len(within))
        key = keys[draws.integers(len(keys))]
        if not isinstance(within[key], (dict, list)) or not within[key] or draws.integers(2):
            break
        within = within[key]
    if draws.integers(4) == 0:
        del within[key]
    else:
        within[key] = odd[draws.integers(len(odd))]
    return json.dumps(whole).encode()


def call(of_script, *arguments):
    """(exit code, stderr). An exception other than SystemExit fails the test."""
    err = io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        utils.run_cli(lambda: of_script(list(arguments)))
    return stop.value.code, err.getvalue()


def test_a_damaged_checkpoint_is_refused_or_whole(uninterrupted, tmp_path, is_long, count):
    path = victims.folder_of(uninterrupted) / utils.CHECKPOINT
    content, expected = path.read_bytes(), checkpoints.load_checkpoint(path)
    draws = np.random.default_rng(0)
    num_refused = 0
    for _ in range(1000 if is_long else 60):
        damaged = tmp_path / utils.CHECKPOINT
        damaged.write_bytes(damage(content, draws))
        count("damaged files tried")
        try:
            state = checkpoints.load_checkpoint(damaged)
        except utils.UserError:
            num_refused += 1
            continue
        for name in victims.STATE:  # the damage was in a gap between the records
            torch.testing.assert_close(state[name], expected[name], rtol=0, atol=0)
    assert num_refused > 0


@pytest.mark.parametrize("name", [utils.CONFIG, utils.METRICS, utils.SUMMARY])
def test_damaged_logs_are_named(uninterrupted, tmp_path, name, is_long, count):
    """plot_result.py skips such a run with a warning, or reads it."""
    draws = np.random.default_rng(1)
    content = (victims.folder_of(uninterrupted) / name).read_bytes()
    for number in range(60 if is_long else 4):
        output = tmp_path / str(number)
        folder = victims.folder_of(output)
        ignore_checkpoint = shutil.ignore_patterns("last.pt")
        shutil.copytree(victims.folder_of(uninterrupted), folder, ignore=ignore_checkpoint)
        (folder / name).write_bytes(damage(content, draws))
        count("damaged files tried")
        code, err = call(plot_result.main, "--results_path", str(output))
        assert code in (0, 1), err
        assert "Traceback" not in err
        assert "error:" in err or code == 0


@pytest.mark.parametrize("name", [utils.CHECKPOINT, utils.CONFIG, utils.METRICS])
def test_a_run_resumes_from_a_damaged_folder_or_says_why_not(
    uninterrupted, tmp_path, name, is_long, count
):
    draws = np.random.default_rng(2)
    for number in range(10 if is_long else 1):
        output = tmp_path / str(number)
        shutil.copytree(victims.folder_of(uninterrupted), victims.folder_of(output))
        (victims.folder_of(output) / utils.SUMMARY).unlink()
        path = victims.folder_of(output) / name
        change = with_odd_value if name == utils.CONFIG and number % 2 else damage
        path.write_bytes(change(path.read_bytes(), draws))
        count("damaged files tried")
        code = victims.finish(output)
        log = (output / "log.txt").read_text()
        assert "Traceback" not in log
        if code == 0:
            victims.assert_same_result(output, uninterrupted)
        else:
            assert code in (1, 2)
            assert log.count("error:") == 1


@pytest.mark.parametrize("name", [utils.CONFIG, utils.SUMMARY])
def test_odd_values_in_a_finished_run_are_read_or_named(
    uninterrupted, tmp_path, name, is_long, count
):
    """By main.py, which finds nothing left to do, by the plan of a sweep, and by plot_result.py."""
    draws = np.random.default_rng(3)
    shutil.copytree(victims.folder_of(uninterrupted), victims.folder_of(tmp_path))
    path = victims.folder_of(tmp_path) / name
    content = path.read_bytes()
    run = plan.PlannedRun(MaskSpec("2d_cardinal", 1), 0, path.parent, tuple(victims.RUN))
    arguments = [*victims.RUN, "--output_dir", str(tmp_path)]
    for _ in range(400 if is_long else 8):
        path.write_bytes(with_odd_value(content, draws))
        count("damaged files tried")
        code, err = call(main.main, *arguments)
        assert (code, "error:" in err) in ((0, False), (1, True), (2, True)), err
        assert run.is_finished() in (True, False)
        code, err = call(plot_result.main, "--results_path", str(tmp_path))
        assert (code, "error:" in err) in ((0, False), (1, True)), err


def test_the_evaluation_of_a_damaged_checkpoint_ends_in_one_line(uninterrupted, tmp_path):
    content = (victims.folder_of(uninterrupted) / utils.CHECKPOINT).read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    code, err = call(evaluation.main, "--checkpoint", str(tmp_path / "last.pt"))
    assert code == 1
    assert len(err.splitlines()) == 1
