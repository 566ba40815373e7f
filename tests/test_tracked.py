"""Every file that the documentation names is in the repository, not just on the author's disk."""

import posixpath
import re
import subprocess
from pathlib import PurePosixPath

import pytest

import utils

DOCUMENTS = [
    "README.md",
    "experiments/README.md",
    *sorted(f"docs/{p.name}" for p in utils.REPOSITORY.glob("docs/*.md")),
]
SUFFIXES = "py|sh|md|json|jsonl|png|svg|txt|toml|ipynb|html|cpp|pt|log"
NAMED = re.compile(rf"(?<![\w./~$<>*-])((?:[\w.-]+/)*[\w-]+\.(?:{SUFFIXES}))(?![\w*])")
# Written by a run, a sweep or a measurement, in a folder of its own.
WRITTEN = {
    *("config.json", "metrics.jsonl", "attention_mask.png", "last.pt", "previous.pt"),
    *(
        "summary.json",
        "log.txt",
        "results.md",
        "results.html",
        "FILE.json",
        "label.txt",
        "rows.jsonl",
    ),
    *("eval_test.json", "eval_test_384x384.json", "tracking.json"),
    *("predictions.csv", "predictions.png"),
}
# The user's own folders, and those that a run or an installation makes.
OF_THE_USER = {
    *("test", "val", "validation", "photos/pets", "imagefolder", ".venv/bin/python", "figures"),
    *("experiments/pets", "experiments/imagefolder", "experiments/cifar10-jpeg"),
    "experiments/gpu",
    *("data", "data/cifar10-jpeg", "data/cifar10-jpeg-5000", "data/tiny-imagenet-20"),
    "data/FashionMNIST/raw",
}
FOLDERS = ("", "experiments/", "docs/")  # names may be relative to any of these


def tracked():
    command = ["git", "ls-files"]
    try:
        done = subprocess.run(command, cwd=utils.REPOSITORY, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip("not a git checkout")
    return set(done.stdout.split())


def names_in(document):
    text = (utils.REPOSITORY / document).read_text(encoding="utf-8")
    # The text of a link may be a short name for its target.
    text = re.sub(r"\[[^\]\n]+\]\(", "](", text)
    names = {name for name in NAMED.findall(text) if name.rpartition("/")[2] not in WRITTEN}
    names |= {name.rstrip("/") for name in paths_in(text)} - OF_THE_USER
    return sorted({in_repository(name, document) for name in names})


def in_repository(name, document):
    """A name that begins with ../ is relative to the document."""
    return posixpath.normpath(f"{document}/../{name}") if name.startswith("../") else name


def paths_in(text):
    """Links, and words in backticks with a slash: also finds folders and files without suffix."""
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    links = [target for target in targets if not target.startswith("http")]

    words = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()]
    # Neither <placeholders> nor ~.
    return links + [word for word in words if re.fullmatch(r"[\w.-]+/[\w./-]*", word)]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_files_that_a_document_names_are_tracked(document):
    files = tracked()
    files |= {str(folder) for file in files for folder in PurePosixPath(file).parents}
    # The file tree in the README names files without their folder.
    in_folders = {
        name.partition("/")[2] for name in files if name.endswith((".py", ".html", ".ipynb"))
    }

    def is_tracked(name):
        return name in in_folders or any(f"{folder}{name}" in files for folder in FOLDERS)

    names = names_in(document)
    assert names
    assert [name for name in names if not is_tracked(name)] == []


def test_names_are_found_in_links_code_and_commands():
    line = (
        "See [JSON](experiments/benchmark/a.json), `logs/b.md`, and bash experiments/gpu.sh PART; "
        "~/x/y.py, *.json"
    )
    expected = ["experiments/benchmark/a.json", "logs/b.md", "experiments/gpu.sh"]
    assert NAMED.findall(line) == expected

    line = (
        "See the [license](LICENSE), [there](https://x.org/y.md), `.ci/run`, `logs/digits/` and "
        "`<dataset>/<run_name>/`"
    )
    assert paths_in(line) == ["LICENSE", ".ci/run", "logs/digits/"]
