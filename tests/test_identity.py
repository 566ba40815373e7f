"""Runs of image folders: one of other data is never handed out, resumed or tabulated as this one's."""

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
    """A folder called as the first one, with other data."""
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
    return ["--dataset", "imagefolder", "--data_dir", str(data_dir), "--output_dir", str(output), *SMALL, *more]


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def forget_files(config):
    """As an earlier version wrote it."""
    del config["data"]["files"], config["settings"]["dataset_name"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An image folder `pets`, and the output folder of a finished run of it."""
    root = tmp_path_factory.mktemp("trained")
    assert main.main(arguments(make_tree(root / "pets"), root / "output")) == 0
    return root


@pytest.fixture
def pets(trained, tmp_path):
    """The same, to be changed."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def run_folder(root, dataset_name="pets"):
    return root / "output" / dataset_name / "full" / "seed_0"


@pytest.fixture
def earlier(pets):
    """A finished run as earlier versions left it: where all image folders were, knowing nothing of its files."""
    (pets / "output" / "pets").rename(pets / "output" / "imagefolder")
    change_json(run_folder(pets, "imagefolder") / "config.json", forget_files)
    return pets


# --------------------------------------------------------------------------------------------------
# main.py


def test_a_run_lies_in_a_folder_called_like_its_data(pets, tmp_path, monkeypatch):
    config = utils.read_json(run_folder(pets) / "config.json")
    assert config["settings"]["dataset_name"] == "pets"
    assert config["data"]["files"].keys() == {"train", "test", "hash"}
    assert (config["data"]["files"]["train"], config["data"]["files"]["test"]) == (6, 6)
    assert checkpoints.load_checkpoint(run_folder(pets) / "last.pt")["data"]["files"] == config["data"]["files"]
    monkeypatch.chdir(pets / "pets")
    settings = main.resolve_settings(main.parse_args(arguments(".", "output")))
    assert settings.run.dataset_name == "pets"
    settings = main.resolve_settings(main.parse_args(arguments(".", "output", "--dataset_name", "mine")))
    assert settings.run.dataset_name == "mine"
    assert main.resolve_settings(main.parse_args(["--device", "cpu"])).run.dataset_name == "cifar10"


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
def test_a_run_of_other_data_is_refused(pets, run_script, monkeypatch, kind, words, state):
    if state != "finished":
        (run_folder(pets) / "summary.json").unlink()
    if state == "no config.json":
        (run_folder(pets) / "config.json").unlink()
    else:  # and before any image is read
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


def test_data_that_is_not_there_is_an_error(pets, run_script):
    shutil.rmtree(pets / "pets")
    code, out, err = run_script(main.main, *arguments(pets / "pets", pets / "output"))
    assert (code, out, len(err.splitlines())) == (1, "", 1), err
    assert str(pets / "pets") in err


def test_the_same_data_moved_is_the_same(pets, capsys, monkeypatch):
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
def test_the_name_of_a_dataset_is_a_plain_folder_name(tmp_path, run_script, name):
    code, _, err = run_script(main.main, *arguments(tmp_path, tmp_path, f"--dataset_name={name}"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--dataset_name must be a plain folder name" in err
    code, _, err = run_script(run_experiments.main, *SWEEP, f"--dataset_name={name}")
    assert (code, len(err.splitlines())) == (2, 1)


# --------------------------------------------------------------------------------------------------
# What an earlier version has left


def test_an_earlier_run_is_finished_where_it_lies(earlier, capsys):
    before = contents(run_folder(earlier, "imagefolder"))
    assert main.main(arguments(earlier / "pets", earlier / "output")) == 0
    printed = capsys.readouterr().out
    assert "imagefolder/full/seed_0, where all image folders once were, and stays there" in printed
    assert "nothing to do" in printed
    assert contents(run_folder(earlier, "imagefolder")) == before
    assert not (earlier / "output" / "pets").exists()


def test_an_earlier_run_is_resumed_where_it_lies(earlier, capsys):
    folder = run_folder(earlier, "imagefolder")
    (folder / "summary.json").unlink()
    assert main.main(arguments(earlier / "pets", earlier / "output")) == 0
    assert "resuming in epoch" in capsys.readouterr().out
    config = utils.read_json(folder / "config.json")
    assert config["settings"]["dataset_name"] == "imagefolder"
    assert config["data"]["files"]["train"] == 6
    assert not (earlier / "output" / "pets").exists()


@pytest.mark.parametrize("kind", ["classes", "counts", "label"])
def test_an_earlier_run_of_other_data_is_left_where_it_lies(earlier, kind):
    if kind == "label":
        make_tree(earlier / "wild", seed=1)
    else:
        others(earlier / "wild", kind)
    before = contents(run_folder(earlier, "imagefolder"))
    assert main.main(arguments(earlier / "wild", earlier / "output")) == 0
    assert (run_folder(earlier, "wild") / "summary.json").exists()
    assert contents(run_folder(earlier, "imagefolder")) == before


def test_an_earlier_run_is_not_handed_out_before_the_pixels_are_compared(earlier, run_script):
    other = make_tree(earlier / "elsewhere" / "pets", seed=1)  # as many images of the same names
    code, out, err = run_script(main.main, *arguments(other, earlier / "output"))
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "nothing to do" not in out
    assert "holds a run with other data: " in err
    assert "checksum" in err


# --------------------------------------------------------------------------------------------------
# Settings that an earlier version did not have


def test_a_setting_that_was_not_there_yet_had_its_default(pets, run_script):
    change_json(
        run_folder(pets) / "config.json", lambda config: [config["settings"].pop(key) for key in ("ema", "mix")]
    )
    code, out, err = run_script(main.main, *arguments(pets / "pets", pets / "output"))
    assert code == 0, err
    assert "nothing to do" in out
    code, _, err = run_script(main.main, *arguments(pets / "pets", pets / "output", "--ema", "0.9"))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "other settings: ema 0.0 there, 0.9 asked for. " in err


def test_a_setting_that_a_checkpoint_does_not_have_had_its_default(pets, run_script):
    folder = run_folder(pets)
    for name in ("config.json", "summary.json"):
        (folder / name).unlink()
    state = checkpoints.load_checkpoint(folder / "last.pt")
    del state["format"], state["settings"]["ema"]
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
    return [*SWEEP, "--output_dir", str(root / "output"), *more, "--", "--data_dir", str(data_dir), *SMALL]


def say_it_was_swept(root, folder):
    """Make a run that of the sweep's command."""
    plan = run_experiments.make_plan(run_experiments.parse_args(sweep(root, root / "pets")), "cpu")
    command = ["main.py", *plan[0].arguments]
    change_json(folder / "config.json", lambda config: config["provenance"].update(command=command))


@pytest.fixture
def script(tmp_path, monkeypatch):
    """What the sweep starts for main.py: a program that ends as it is told, and leaves a trace."""
    path, trace = tmp_path / "main.py", tmp_path / "started"

    def end_with(code):
        path.write_text(f"import pathlib, sys\npathlib.Path({str(trace)!r}).touch()\nsys.exit({code})\n")
        monkeypatch.setattr(run_experiments, "MAIN_SCRIPT", path)
        return trace

    return end_with


def test_a_sweep_of_the_same_data_is_finished_and_tabulated(pets, run_script, script):
    started = script(1)
    say_it_was_swept(pets, run_folder(pets))
    code, out, err = run_script(run_experiments.main, *sweep(pets, pets / "pets"))
    assert code == 0, err
    assert "1 runs, 1 finished before" in out
    assert "(n = 1)" in out
    assert not started.exists()


@pytest.mark.parametrize("more", [(), ("--dry_run",)])
@pytest.mark.parametrize("kind", ["classes", "counts", "names", "sizes", "missing"])
def test_a_sweep_of_other_data_starts_and_tabulates_nothing(pets, run_script, script, kind, more):
    started = script(0)
    say_it_was_swept(pets, run_folder(pets))
    shutil.rmtree(pets / "pets")
    if kind != "missing":
        others(pets / "pets", kind)
    before = contents(pets / "output")
    code, out, err = run_script(run_experiments.main, *sweep(pets, pets / "pets", *more))
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert ("cannot read the folder" if kind == "missing" else "holds a run with other data") in err
    assert not started.exists()
    assert contents(pets / "output") == before


def test_a_sweep_of_another_folder_lies_beside(pets, run_script, script):
    script(1)
    others(pets / "wild", "counts")
    code, out, _ = run_script(run_experiments.main, *sweep(pets, pets / "wild", "--dry_run"))
    assert code == 0
    assert "finished" not in out
    code, out, _ = run_script(run_experiments.main, *sweep(pets, pets / "wild", "--dataset_name", "mine"))
    assert code == 1
    assert "(n = 1)" not in out
    assert (run_folder(pets, "mine") / "log.txt").exists()


@pytest.mark.parametrize("code", [0, 2])
def test_a_sweep_leaves_it_to_main_to_compare_an_earlier_run(earlier, run_script, script, code):
    started = script(code)
    folder = run_folder(earlier, "imagefolder")
    say_it_was_swept(earlier, folder)
    got, out, _ = run_script(run_experiments.main, *sweep(earlier, earlier / "pets"))
    assert f"1 of 1 runs were started in {folder.parents[1]} and stay there" in out
    assert started.exists()
    assert got == (1 if code else 0)
    assert ("(n = 1)" in out) == (code == 0)  # what main.py has refused is in no table


def test_a_finished_run_of_other_settings_is_not_tabulated(pets, run_script, script):
    script(2)
    code, out, _ = run_script(run_experiments.main, *sweep(pets, pets / "pets"), "--lr", "0.5")
    assert code == 1
    assert "(n = 1)" not in out


def test_a_sweep_compares_data_without_torch(pets):
    program = (
        f"import sys, run_experiments; code = run_experiments.main({sweep(pets, pets / 'pets', '--dry_run')!r})\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=utils.REPOSITORY).returncode == 0


# --------------------------------------------------------------------------------------------------
# Reports


def fake_run(root, seed, **of_data):
    folder = write_run(root, seed=seed, dataset="imagefolder", label="pets")
    change_json(folder / "config.json", lambda config: config["data"].update(of_data))


FILES = {"train": 6, "test": 6, "hash": "0123"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"files": FILES}, {"files": FILES | {"hash": "4567"}}),
        ({"checksum": "01", "image_shape": [3, 8, 8]}, {"checksum": "02", "image_shape": [3, 8, 8]}),
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
        ({"checksum": "01", "image_shape": [3, 8, 8]}, {"checksum": "02", "image_shape": [3, 4, 4]}),
        ({}, {"checksum": "01"}),
    ],
)
def test_the_same_data_is_plotted_together(tmp_path, first, second):
    fake_run(tmp_path / "a", 0, **first)
    fake_run(tmp_path / "b", 1, **second)
    assert len(plot_result.load_comparison(tmp_path)) == 2


@pytest.mark.parametrize(
    "logs", sorted((utils.REPOSITORY / "experiments" / "logs").iterdir()), ids=lambda path: path.name
)
def test_the_logs_that_are_kept_can_be_plotted(logs):
    assert plot_result.load_comparison(logs)


# --------------------------------------------------------------------------------------------------
# eval.py


def evaluate(root, data_dir):
    output = root / "eval.json"
    command = ["--checkpoint", str(run_folder(root) / "last.pt"), "--device", "cpu", "--output", str(output)]
    assert evaluation.main([*command, "--data_dir", str(data_dir)]) == 0
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
