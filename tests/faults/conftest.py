"""How much to try: a little in `make test`, a lot in `make faults`.

`make faults` sets FAULTS=long and prints the totals.
"""

import os

import pytest
import victims

LONG = os.environ.get("FAULTS") == "long"
TOTALS: dict[str, int] = {}


@pytest.fixture(scope="session")
def is_long():
    return LONG


@pytest.fixture(scope="session")
def count():
    """count(what, n=1): add to the totals that `make faults` prints."""

    def add(what, n=1):
        TOTALS[what] = TOTALS.get(what, 0) + n

    return add


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The output folder of a run that nothing has interrupted."""
    output = tmp_path_factory.mktemp("uninterrupted")
    assert victims.finish(output) == 0, (output / "log.txt").read_text()
    return output


def pytest_terminal_summary(terminalreporter):
    if LONG and TOTALS:
        terminalreporter.section("faults")
        for what, number in sorted(TOTALS.items()):
            terminalreporter.line(f"{number:>6} {what}")
