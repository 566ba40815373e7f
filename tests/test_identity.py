"""A run on another image folder is never reported, resumed or tabulated as a run on this one."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from fake_runs import write_run
from PIL import Image

import eval as evaluation
import main
import plot_result
import run_experiments
import utils
from report import differences
from training import checkpoints

SMALL = [
    *("--model", "vit_micro", "--depth", "1", "--img_size", "16", "--patch_size", "4"),
    *("--device", "cpu", "--epochs", "1"),
]
SWEEP = ["--gpus", "0", "--mask_types", '["full"]', "--dataset", "imagefolder"]


def make_tree(root, classes=("cat", "dog"), seed=0, number=3):
    """An image folder of noise."""
    draw = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = draw.integers(256, size=(8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png", compress_level=9)
    return root


def others(root, kind):
    """A folder with the same name as the first one but other data."""
    if kind == "classes":
        return make_tree(root, ("cat", "eel"))
    if kind == "counts":
        return make_tree(root, number=4)
    make_tree(root)
    if kind == "names":
        (root / "test" / "cat" / "0.png").rename(root / "test" / "cat" / "zero.png")
    else:
        with open(root / "train" / "dog" / "2.png", "ab") as file:
            file.write(b"more bytes")
    return root


def arguments(data_dir, output, *more):
    folders = ["--data_dir", str(data_dir), "--output_dir", str(output)]
    return ["--dataset", "imagefolder", *folders, *SMALL, *more]


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def forget_files(config):
    """Turn config.json into what earlier versions wrote."""
    del config["data"]["files"]
    del config["settings"]["dataset_name"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An image folder `pets`, and the output folder of a finished run on it."""
    root = tmp_path_factory.mktemp("trained")
    assert main.main(arguments(make_tree(root / "pets"), root / "output")) == 0
    return root


@pytest.fixture
def pets(trained, tmp_path):
    """A copy that the test may change."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def run_folder(root, dataset_name="pets"):
    return root / "output" / dataset_name / "full" / "seed_0"


@pytest.fixture
def earlier(pets):
    """A finished run as earlier versions left it: in `imagefolder/`, and not knowing its files."""
    (pets / "output" / "pets").rename(pets / "output" / "imagefolder")
    change_json(run_folder(pets, "imagefolder") / "config.json", forget_files)
    return pets


# --------------------------------------------------------------------------------------------------
# main.py


def test_a_run_goes_to_a_folder_named_after_its_data(pets, tmp_path, monkeypatch):
    config = utils.read_json(run_folder(pets) / "config.json")
    assert config["settings"]["dataset_name"] == "pets"
    assert config["data"]["files"].keys() == {"train", "test", "hash"}
    assert (config["data"]["files"]["train"], config["data"]["files"]["test"]) == (6, 6)
    checkpoint = checkpoints.load_checkpoint(run_folder(pets) / "last.pt")
    assert checkpoint["data"]["files"] == config["data"]["files"]

    def dataset_name(*command):
        return main.resolve_settings(main.parse_args(command)).run.dataset_name

    monkeypatch.chdir(pets / "pets")
    assert dataset_name(*arguments(".", "output")) == "pets"
    assert dataset_name(*arguments(".", "output", "--dataset_name", "mine")) == "mine"
    assert dataset_name("--device", "cpu") == "cifar10"


@pytest.mark.parametrize("state", ["finished", "unfinished", "no config.json"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("classes", "classes dog only there, eel only here"),
        ("counts", "6 train images there, 8 here"),
        ("names", "other names or sizes"),
        ("sizes", "other names or sizes"),
    ],
)
def test_a_run_on_other_data_is_refused(pets, run_script, monkeypatch, kind, words, state):
    if state != "finished":
        (run_folder(pets) / "summary.json").unlink()
    if state == "no config.json":
        (run_folder(pets) / "config.json").unlink()
    else:  # then it is refused before any image is read
        monkeypatch.setattr(main, "load_dataset", None)

    other = others(pets / "elsewhere" / "pets", kind)
    before = contents(run_folder(pets))
    code, out, err = run_script(main.main, *arguments(other, pets / "output"))
    assert (code, len(err.splitlines())) == (2, 1), err
    assert out == ""
    assert "holds a run with other data" in err
    assert words in err
    assert "--dataset_name" in err
    assert contents(run_folder(pets)) == before


def test_two_folders_of_different_names_share_nothing(pets):
    other = others(pets / "wild", "counts")
    assert main.main(arguments(other, pets / "output")) == 0
    assert utils.read_json(run_folder(pets, "wild") / "config.json")["data"]["num_train"] == 8
    assert utils.read_json(run_folder(pets) / "config.json")["data"]["num_train"] == 6


def test_missing_data_is_an_error(pets, run_script):
    shutil.rmtree(pets / "pets")
    code, out, err = run_script(main.main, *arguments(pets / "pets", pets / "output"))
    assert (code, out, len(err.splitlines())) == (1, "", 1), err
    assert str(pets / "pets") in err


def test_data_that_was_moved_is_still_the_same(pets, capsys, monkeypatch):
    monkeypatch.setattr(main, "load_dataset", None)
    (pets / "pets").rename(pets / "moved")
    assert main.main(arguments(pets / "moved", pets / "output", "--dataset_name", "pets")) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_same_data_under_another_name_is_resumed(pets, capsys):
    (run_folder(pets) / "summary.json").unlink()
    (pets / "pets").rename(pets / "moved")
    assert main.main(arguments(pets / "moved", pets / "output", "--dataset_name", "pets")) == 0
    assert "resuming in epoch" in capsys.readouterr().out


def test_digits_need_no_data_on_disk(tmp_path, capsys):
    command = ["--dataset", "digits", "--output_dir", str(tmp_path), *SMALL, "--batch_size", "512"]
    assert main.main(command) == 0
    assert main.main([*command, "--data_dir", str(tmp_path / "nowhere")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main.main([*command, "--dataset_name", "mine"]) == 0
    assert (tmp_path / "mine" / "full" / "seed_0" / "summary.json").exists()


@pytest.mark.parametrize("name", ["a/b", "..", ""])
def test_dataset_name_must_be_a_plain_folder_name(tmp_path, run_script, name):
    code, _, err = run_script(main.main, *arguments(tmp_path, tmp_path, f"--dataset_name={name}"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--dataset_name must be a plain folder name" in err
    code, _, err = run_script(run_experiments.main, *SWEEP, f"--dataset_name={name}")
    assert (code, len(err.splitlines())) == (2, 1)


# --------------------------------------------------------------------------------------------------
# Runs of earlier versions


def test_an_earlier_run_that_is_finished_stays_where_it_is(earlier, capsys):
    before = contents(run_folder(earlier, "imagefolder"))
    assert main.main(arguments(earlier / "pets", earlier / "output")) == 0
    printed = capsys.readouterr().out
    assert (
        "imagefolder/full/seed_0, which all image folders used to share, and stays there" in printed
    )
    assert "nothing to do" in printed
    assert contents(run_folder(earlier, "imagefolder")) == before
    assert not (earlier / "output" / "pets").exists()


def test_an_earlier_run_is_resumed_where_it_is(earlier, capsys):
    folder = run_folder(earlier, "imagefolder")
    (folder / "summary.json").unlink()
    assert main.main(arguments(earlier / "pets", earlier / "output")) == 0
    assert "resuming in epoch" in capsys.readouterr().out
    config = utils.read_json(folder / "config.json")
    assert config["settings"]["dataset_name"] == "imagefolder"
    assert config["data"]["files"]["train"] == 6
    assert not (earlier / "output" / "pets").exists()


@pytest.mark.parametrize("kind", ["classes", "counts", "label"])
def test_an_earlier_run_on_other_data_is_left_alone(earlier, kind):
    if kind == "label":
        make_tree(earlier / "wild", seed=1)
    else:
        others(earlier / "wild", kind)
    before = contents(run_folder(earlier, "imagefolder"))
    assert main.main(arguments(earlier / "wild", earlier / "output")) == 0
    assert (run_folder(earlier, "wild") / "summary.json").exists()
    assert contents(run_folder(earlier, "imagefolder")) == before


def test_an_earlier_run_only_counts_after_the_pixels_are_compared(earlier, run_script):
    other = make_tree(earlier / "elsewhere" / "pets", seed=1)  # as many images with the same names
    code, out, err = run_script(main.main, *arguments(other, earlier / "output"))
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "nothing to do" not in out
    assert "holds a run with other data: " in err
    assert "checksum" in err


# --------------------------------------------------------------------------------------------------
# Settings that earlier versions did not have


def test_a_setting_missing_from_the_config_had_its_default(pets, run_script):
    def forget_settings(config):
        del config["settings"]["ema"]
        del config["settings"]["mix"]

    change_json(run_folder(pets) / "config.json", forget_settings)
    code, out, err = run_script(main.main, *arguments(pets / "pets", pets / "output"))
    assert code == 0, err
    assert "nothing to do" in out
    code, _, err = run_script(main.main, *arguments(pets / "pets", pets / "output", "--ema", "0.9"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "other settings: ema 0.0 there, 0.9 asked for. " in err


def test_a_setting_missing_from_the_checkpoint_had_its_default(pets, run_script):
    folder = run_folder(pets)
    for name in ("config.json", "summary.json"):
        (folder / name).unlink()
    state = checkpoints.load_checkpoint(folder / "last.pt")
    del state["format"]
    del state["settings"]["ema"]
    checkpoints.save_checkpoint(folder, state)
    code, _, err = run_script(main.main, *arguments(pets / "pets", pets / "output", "--ema", "0.9"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "other settings: ema 0.0 there, 0.9 asked for. " in err
    code, out, err = run_script(main.main, *arguments(pets / "pets", pets / "output"))
    assert code == 0, err
    assert "resuming in epoch" in out


# --------------------------------------------------------------------------------------------------
# The sweep


def sweep(root, data_dir, *more):
    own = [*SWEEP, "--output_dir", str(root / "output"), *more]
    return [*own, "--", "--data_dir", str(data_dir), *SMALL]


def record_command_of_sweep(root, folder):
    """Let config.json say that the sweep's command started this run."""
    args = run_experiments.parse_args(sweep(root, root / "pets"))
    plan = run_experiments.make_plan(args, "cpu", run_experiments.choose_masks(args)[0])
    command = ["main.py", *plan[0].arguments]
    change_json(folder / "config.json", lambda config: config["provenance"].update(command=command))


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A stand-in for main.py that leaves a trace and exits with a given code."""
    path = tmp_path / "main.py"
    trace = tmp_path / "started"
    touch = f"pathlib.Path({str(trace)!r}).touch()"

    def end_with(code):
        path.write_text(f"import pathlib, sys\n{touch}\nsys.exit({code})\n")
        monkeypatch.setattr(run_experiments, "MAIN_SCRIPT", path)
        return trace

    return end_with


def test_a_sweep_on_the_same_data_is_finished_and_tabulated(pets, run_script, script):
    started = script(1)
    record_command_of_sweep(pets, run_folder(pets))
    code, out, err = run_script(run_experiments.main, *sweep(pets, pets / "pets"))
    assert code == 0, err
    assert "1 runs, 1 finished before" in out
    assert "(n = 1)" in out
    assert not started.exists()


@pytest.mark.parametrize("more", [(), ("--dry_run",)])
@pytest.mark.parametrize("kind", ["classes", "counts", "names", "sizes", "missing"])
def test_a_sweep_on_other_data_starts_and_tabulates_nothing(pets, run_script, script, kind, more):
    started = script(0)
    record_command_of_sweep(pets, run_folder(pets))
    shutil.rmtree(pets / "pets")
    if kind != "missing":
        others(pets / "pets", kind)
    before = contents(pets / "output")
    words = "cannot read the folder" if kind == "missing" else "holds a run with other data"

    code, out, err = run_script(run_experiments.main, *sweep(pets, pets / "pets", *more))
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert words in err
    assert not started.exists()
    assert contents(pets / "output") == before


def test_a_sweep_on_another_folder_goes_to_its_own_place(pets, run_script, script):
    script(1)
    others(pets / "wild", "counts")
    code, out, _ = run_script(run_experiments.main, *sweep(pets, pets / "wild", "--dry_run"))
    assert code == 0
    assert "finished" not in out

    renamed = sweep(pets, pets / "wild", "--dataset_name", "mine")
    code, out, _ = run_script(run_experiments.main, *renamed)
    assert code == 1
    assert "(n = 1)" not in out
    assert (run_folder(pets, "mine") / "log.txt").exists()


@pytest.mark.parametrize("code", [0, 2])
def test_a_sweep_lets_main_compare_an_earlier_run(earlier, run_script, script, code):
    started = script(code)
    folder = run_folder(earlier, "imagefolder")
    record_command_of_sweep(earlier, folder)
    got, out, _ = run_script(run_experiments.main, *sweep(earlier, earlier / "pets"))
    assert f"1 of 1 runs were started in {folder.parents[1]} and stay there" in out
    assert started.exists()
    assert got == (1 if code else 0)
    assert ("(n = 1)" in out) == (code == 0)  # a refused run is in no table


def test_a_finished_run_with_other_settings_is_not_tabulated(pets, run_script, script):
    script(2)
    code, out, _ = run_script(run_experiments.main, *sweep(pets, pets / "pets"), "--lr", "0.5")
    assert code == 1
    assert "(n = 1)" not in out


def test_a_sweep_compares_data_without_torch(pets):
    command = sweep(pets, pets / "pets", "--dry_run")
    program = (
        "import sys, run_experiments\n"
        f"code = run_experiments.main({command!r})\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=utils.REPOSITORY).returncode == 0


# --------------------------------------------------------------------------------------------------
# Reports


def fake_run(root, seed, **data):
    folder = write_run(root, seed=seed, dataset="imagefolder", label="pets")
    change_json(folder / "config.json", lambda config: config["data"].update(data))


def pixels(checksum, *image_shape):
    return {"checksum": checksum, "image_shape": list(image_shape)}


FILES = {"train": 6, "test": 6, "hash": "0123"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"files": FILES}, {"files": FILES | {"hash": "4567"}}),
        (pixels("01", 3, 8, 8), pixels("02", 3, 8, 8)),
        ({}, {"label": "wild"}),
    ],
)
def test_two_image_folders_are_not_plotted_together(tmp_path, run_script, first, second):
    fake_run(tmp_path / "a", 0, **first)
    fake_run(tmp_path / "b", 1, **second)
    code, _, err = run_script(plot_result.main, "--results_path", str(tmp_path))
    assert (code, len(err.splitlines())) == (1, 1)
    assert "holds several datasets (pets in " in err
    assert str(tmp_path / "b" / "imagefolder") in err


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"files": FILES}, {"files": FILES, "label": "moved"}),
        ({"files": FILES, "checksum": "01"}, {"checksum": "01"}),
        (pixels("01", 3, 8, 8), pixels("02", 3, 4, 4)),
        ({}, {"checksum": "01"}),
    ],
)
def test_the_same_data_is_plotted_together(tmp_path, first, second):
    fake_run(tmp_path / "a", 0, **first)
    fake_run(tmp_path / "b", 1, **second)
    assert len(differences.load_comparable(tmp_path)) == 2


LOGS = utils.REPOSITORY / "experiments" / "logs"


@pytest.mark.parametrize(
    "logs", sorted(path for path in LOGS.iterdir() if path.is_dir()), ids=lambda path: path.name
)
def test_the_committed_logs_can_be_plotted(logs):
    assert differences.load_comparable(logs)


# --------------------------------------------------------------------------------------------------
# eval.py


def evaluate(root, data_dir):
    output = root / "eval.json"
    command = ["--checkpoint", str(run_folder(root) / "last.pt"), "--data_dir", str(data_dir)]
    assert evaluation.main([*command, "--device", "cpu", "--output", str(output)]) == 0
    return utils.read_json(output)


def test_an_evaluation_on_other_images_says_so(pets, capsys):
    (pets / "pets").rename(pets / "moved")
    assert evaluate(pets, pets / "moved")["data_as_trained"] is True
    assert capsys.readouterr().err == ""
    report = evaluate(pets, make_tree(pets / "wild", seed=1))
    assert report["data_as_trained"] is False
    assert report["data"] == "wild"
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "warning: wild holds other images than the checkpoint was trained and tested with" in err
