"""All studies side by side: the figure and the table at the top of the README.

python experiments/overview.py   # writes experiments/logs/overview.png, .svg and .md
"""

from __future__ import annotations

import sys
from pathlib import Path

# The repository, wherever this is called from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from report import comparison, figures, logs, overview, results

LOGS = utils.REPOSITORY / "experiments" / "logs"
STUDIES = ("digits",)


def load() -> list[comparison.Study]:
    runs = [logs.load_runs(LOGS / name) for name in STUDIES]
    return [comparison.study(results.group_by_pattern(runs_of_one)) for runs_of_one in runs]


def main() -> None:
    studies = load()
    figures.save_as(overview.draw_differences(studies), LOGS / "overview")
    utils.write_text(LOGS / "overview.md", overview.format_differences(studies))


if __name__ == "__main__":
    main()
