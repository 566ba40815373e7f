"""The study: each part of experiments/study.sh plans its runs; the image folders it is made of."""

import importlib
import os
import re
import subprocess
import sys

import pytest
from image_folders import draw

import utils

SCRIPT = utils.REPOSITORY / "experiments" / "study.sh"
RUNS = {  # of each part
    "digits": 8 * 5,
    "cifar": 8 * 3,
    "longer": 2 * 3,
    "rates": 2 * 3,
    "cutmix": 2 * 3,
    "class_token": 2 * 3,
    "fashion": 6 * 2,
    "tiny": 5 * 2,
    "tiny_rates": 2 * 2 + 2,
    "pixels": 3 * 2,
}


@pytest.fixture
def study_data(monkeypatch):
    monkeypatch.syspath_prepend(utils.REPOSITORY / "experiments")
    module = importlib.import_module("study_data")
    monkeypatch.setattr(module, "IMAGES_PER_CLASS", {"train": 2, "test": 1})
    return module


def write_cifar(data):
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            for index in range(3):
                draw(data / "cifar10-jpeg" / split / name / f"{index}.png", label, (32, 32), index)


def write_tiny_imagenet(root):
    """As it is distributed, with 21 classes."""
    wnids = [f"n{index:08}" for index in range(21)]
    for wnid in wnids:
        draw(root / "train" / wnid / "images" / f"{wnid}_0.JPEG", 0, (64, 64))
    words = [f"{wnid}\tice lolly {index}, lolly" for index, wnid in enumerate(wnids)]
    (root / "words.txt").write_text("\n".join([*words, "n99999999\tunused"]) + "\n")

    lines = []
    for index, wnid in enumerate([wnids[10], wnids[11], wnids[0]]):
        draw(root / "val" / "images" / f"val_{index}.JPEG", 1, (64, 64))
        lines.append(f"val_{index}.JPEG\t{wnid}\t0\t32\t44\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_folders_hold_what_they_say(study_data, tmp_path):
    write_cifar(tmp_path)
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    study_data.main(tmp_path)

    pixels = [f"{name}/{index}.png" for name in ("cat", "dog") for index in (0, 1)]
    expected = ["label.txt", "test/cat/0.png", "test/dog/0.png", *(f"train/{x}" for x in pixels)]
    assert files_of(tmp_path / "cifar10-jpeg-5000") == expected

    trained = [f"train/ice_lolly_{n}/n{n:08}_0.JPEG" for n in (0, 10, 20)]
    tested = ["test/ice_lolly_0/val_2.JPEG", "test/ice_lolly_10/val_0.JPEG"]
    assert files_of(tmp_path / "tiny-imagenet-20") == ["label.txt", *tested, *trained]
    assert "20 of its 200 classes" in (tmp_path / "tiny-imagenet-20" / "label.txt").read_text()


def test_an_interrupted_folder_is_made_anew_and_a_whole_one_is_kept(study_data, tmp_path, capsys):
    write_cifar(tmp_path)
    (tmp_path / ".cifar10-jpeg-5000.unfinished" / "train" / "eel").mkdir(parents=True)
    study_data.main(tmp_path)
    study_data.main(tmp_path)
    folder = tmp_path / "cifar10-jpeg-5000"
    assert not (folder / "train" / "eel").exists()
    assert f"{folder} exists already" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar10-jpeg", folder.name]


def study(part, data, *options):
    """Run a part with logs of its own, so that no run counts as finished."""
    environment = {**os.environ, "PYTHON": sys.executable, "DATA": str(data), "LOGS": str(data)}
    return subprocess.run(
        ["bash", SCRIPT, part, *options], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name in ("cifar10-jpeg", "cifar10-jpeg-5000", "tiny-imagenet-20"):
        for split in ("train", "test"):
            draw(root / name / split / "cat" / "0.png", 0)
    return root


@pytest.mark.parametrize("part", RUNS)
def test_each_part_plans_its_runs(part, data):
    done = study(part, data, "--dry_run")
    assert done.returncode == 0, done.stderr
    planned = re.findall(r"^CPU .* seed \d", done.stdout, flags=re.MULTILINE)
    assert len(planned) == RUNS[part]


def test_the_script_lists_its_parts():
    listed = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert re.findall(r"^  (\w+) ", listed.stdout, flags=re.MULTILINE) == [*RUNS, "analyses"]


def test_an_unknown_part_is_refused_in_one_line(tmp_path):
    done = study("ciphar", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("study.sh: error: no part is called ciphar; expected one of ")
    assert len(done.stderr.splitlines()) == 1
