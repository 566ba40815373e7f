"""Fixtures and hooks for all tests."""

import os
import signal

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: more threads would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import utils

SLOW_FILES = ("test_slurm", "test_native", "test_train")


def pytest_configure(config):
    # A shell without job control starts background jobs with SIGINT ignored, and every process that
    # the tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    # The files that take longest come first, or one would go on alone at the end.
    items.sort(key=lambda item: item.path.stem not in SLOW_FILES)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the signal handlers after each test.

    A run that was asked to stop leaves SIGTERM ignored, since its process is about to exit.
    """
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    yield

    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run_script(capsys):
    """Call a script's main() as the command line would.

    `run_script(main, *arguments)` -> (exit code, stdout, stderr).
    """

    def run(main, *arguments):
        capsys.readouterr()  # drop what was printed before
        with pytest.raises(SystemExit) as stop:
            utils.run_cli(lambda: main(list(arguments)))

        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run
