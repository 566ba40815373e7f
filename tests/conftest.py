import pytest
import torch

import utils


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")


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
