import signal

import pytest
import torch

import utils


def pytest_configure(config):
    # A shell without job control has what it starts in the background ignore Ctrl-C, and so would all that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run that was asked to stop leaves SIGTERM ignored: its process is about to end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run_script(capsys):
    """Call a script's main() as a command line: `run_script(main, *arguments)` -> (exit code, stdout, stderr)."""

    def run(main, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            utils.run_cli(lambda: main(list(arguments)))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run
