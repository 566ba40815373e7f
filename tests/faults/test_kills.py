"""A run that is killed at any moment, any number of times, ends as if nothing had happened."""

import contextlib
import os
import signal
import time

import numpy as np
import pytest
import victims

import utils

KILLS_A_RUN = 6


@pytest.mark.parametrize("place", victims.FAULTS)
def test_killed_at_a_place_and_resumed(place, uninterrupted, tmp_path, is_long, count):
    special = {"in a step": 2 * 23 + 5, "before summary.json": 1, "in the write of config.json": 1}
    times = special.get(place, 3)
    for number in range(1, times + 1) if is_long and times < 10 else [times]:
        output = tmp_path / str(number)
        assert victims.finish(output, fault=(place, number)) == -signal.SIGKILL
        assert not (victims.folder_of(output) / utils.SUMMARY).exists()
        count("kills survived")
        assert victims.finish(output) == 0, (output / "log.txt").read_text()
        victims.assert_same_result(output, uninterrupted)
        count("epochs lost or logged twice", 0)


def test_killed_at_random_moments_and_resumed(uninterrupted, tmp_path, is_long, count):
    """Several kills per run, at moments drawn uniformly from the duration of a whole run."""
    start = time.perf_counter()
    assert victims.finish(tmp_path / "timed") == 0
    whole = time.perf_counter() - start
    draws = np.random.default_rng()
    num_kills = 0
    for number in range(100):
        output = tmp_path / str(number)
        for _ in range(KILLS_A_RUN):
            process = victims.start(output)
            process.join(draws.uniform(0, whole))
            if process.exitcode is None:
                process.kill()
                num_kills += 1
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), (output / "log.txt").read_text()
        assert victims.finish(output) == 0, (output / "log.txt").read_text()
        victims.assert_same_result(output, uninterrupted)
        if num_kills >= (60 if is_long else 4):
            break
    count("kills survived", num_kills)
    count("epochs lost or logged twice", 0)


def test_stopped_by_signals_and_resumed(uninterrupted, tmp_path, is_long, count):
    draws = np.random.default_rng()
    for number in range(10 if is_long else 1):
        output = tmp_path / str(number)
        while not (victims.folder_of(output) / utils.SUMMARY).exists():
            process = victims.start(output)
            process.join(draws.uniform(1.0, 3.0))
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, draws.choice([signal.SIGTERM, signal.SIGUSR1]))
            process.join()
            # 0: done, 75: asked to stop, negative: the signal came before main.py was listening.
            assert process.exitcode in (0, utils.EXIT_AGAIN, -signal.SIGTERM, -signal.SIGUSR1)
            count("stops by SIGTERM or SIGUSR1 survived", process.exitcode != 0)
        victims.assert_same_result(output, uninterrupted)
