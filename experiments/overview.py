"""The studies side by side.

    python experiments/overview.py

Writes experiments/logs/overview.png, .svg and .md, and the same as recipes.* for the studies of
CIFAR images that differ in how they are trained. Studies without results yet are left out, and
nothing is written for a single one.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The repository, wherever this is called from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from report import comparison, differences, figures, overview, results

LOGS = utils.REPOSITORY / "experiments" / "logs"
STUDIES = {
    "overview": (
        "digits",
        "cifar10-jpeg",
        "fashion_mnist",
        "tiny-imagenet-20",
        "cifar10-jpeg-pixels",
    ),
    "recipes": (
        "cifar10-jpeg",
        "cifar10-jpeg-20-epochs",
        "cifar10-jpeg-cutmix",
        "cifar10-jpeg-class-token",
    ),
}


def load(name: str) -> list[comparison.Study]:
    """Those of a group that have a finished run to compare with full attention."""
    found = []
    for folder in STUDIES[name]:
        if (LOGS / folder).is_dir():
            runs = differences.load_comparable(LOGS / folder)
            study = comparison.study(results.group_by_pattern(runs))
            if study.against_full:
                found.append(study)
                continue
        print(f"{name}: no results of {folder} yet")
    return found


def names_of(name: str, studies: list[comparison.Study]) -> list[str]:
    """The lines of a group: recipes were compared on a few of the patterns, so only on those."""
    return overview.names_in(studies, at_least=2 if name == "recipes" else 1)


def main() -> None:
    for name in STUDIES:
        studies = load(name)
        if len(studies) > 1:
            names = names_of(name, studies)
            figures.save_as(overview.draw_differences(studies, names), LOGS / name)
            utils.write_text(LOGS / f"{name}.md", overview.format_differences(studies, names))


if __name__ == "__main__":
    main()
