"""Runs that start from weights: loading, freezing, layer decay, resuming, refusals."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from test_weights import make_hugging_face, randomize

import eval as evaluation
import main
import utils
from models import VisionTransformer
from training import checkpoints, optimizers, starting
from training.settings import Settings

MODEL = ["--embed_dim", "32", "--depth", "2", "--num_heads", "2", "--dropout", "0"]
DIGITS = [
    *("--dataset", "digits", "--img_size", "8", "--patch_size", "2", *MODEL),
    *("--device", "cpu", "--batch_size", "512", "--lr", "2e-3", "--epochs", "1"),
]
SIZES = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}


def run(output, *arguments):
    return main.main([*DIGITS, "--output_dir", str(output), *arguments])


def folder_of(output, name="full"):
    return output / "digits" / name / "seed_0"


def config_of(folder):
    return utils.read_json(folder / "config.json")


def state_of(folder):
    return checkpoints.load_checkpoint(folder / "last.pt")


def save_timm(path, **changed):
    model = randomize(timm.models.VisionTransformer(**SIZES | changed), std=0.05)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, path)
    return path, state


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A file of timm with the digits' ten classes, for color images and a larger grid."""
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    return save_timm(path, img_size=16, num_classes=10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pretrained):
    """A finished run of one epoch from that file, with averaged weights."""
    output = tmp_path_factory.mktemp("runs")
    assert run(output, "--pretrained", str(pretrained[0]), "--ema", "0.5") == 0
    return folder_of(output)


def test_config_says_what_was_loaded(finished, pretrained):
    about = config_of(finished)["weights"]
    assert about["file"] == str(pretrained[0])
    assert about["source"] == "timm"
    assert len(about["sha256"]) == 64
    assert about["num_heads"].startswith("not in the file")
    assert about["parts"] == {
        "patch_embed": "resized, 3 to 1 channels",
        "cls_token": "loaded",
        "pos_embed": "resized, grid 8x8 to 4x4, bicubic",
        "blocks": "loaded, 2, 24 tensors",
        "norm": "loaded",
        "head": "loaded, 10 classes",
    }
    assert state_of(finished)["weights"] == about


def test_a_run_begins_with_these_weights(tmp_path, pretrained, capsys):
    """With a learning rate of almost nothing, they are still there at the end."""
    path, weights = pretrained
    assert run(tmp_path, "--pretrained", str(path), "--lr", "1e-12") == 0
    trained = state_of(folder_of(tmp_path))["model"]
    for name in ("blocks.1.attn.qkv.weight", "cls_token", "head.weight", "norm.bias"):
        torch.testing.assert_close(trained[name], weights[name], rtol=1e-5, atol=1e-6)
    printed = capsys.readouterr().out
    assert f"weights of {path}:" in printed
    assert "  pos_embed    resized   grid 8x8 to 4x4, bicubic" in printed


def test_runs_from_drawn_weights_note_nothing(tmp_path):
    assert run(tmp_path) == 0
    assert "weights" not in config_of(folder_of(tmp_path))
    assert state_of(folder_of(tmp_path))["weights"] is None


def test_a_dry_run_shows_the_table(tmp_path, pretrained, capsys):
    assert run(tmp_path, "--pretrained", str(pretrained[0]), "--dry_run") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["weights"]["parts"]["head"] == "loaded, 10 classes"


def test_the_eps_of_hugging_face_survives_a_resume(tmp_path):
    library = make_hugging_face()
    library.save_pretrained(tmp_path)
    size = ["--embed_dim", "48", "--num_heads", "3", "--patch_size", "4"]
    start = ["--pretrained", str(tmp_path / "model.safetensors"), *size]
    assert run(tmp_path, *start) == 0
    folder = folder_of(tmp_path)
    assert state_of(folder)["model_config"]["norm_eps"] == 1e-12
    assert checkpoints.rebuild_model(state_of(folder)).norm.eps == 1e-12
    settings = main.resolve_settings(main.parse_args([*DIGITS, *start]))
    assert starting.read(settings, state_of(folder)).norm_eps == 1e-12


# --------------------------------------------------------------------------------------------------
# From a run of ours


def test_init_from_takes_the_averaged_weights(tmp_path, finished):
    arguments = ["--init_from", str(finished / "last.pt"), "--lr", "1e-12", "--run_name", "more"]
    assert run(tmp_path, *arguments, "--mask_type", "2d_cardinal") == 0
    folder = folder_of(tmp_path, "more")
    earlier, trained = state_of(finished), state_of(folder)["model"]
    for name, expected in earlier["average"].items():
        torch.testing.assert_close(trained[name], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(trained["head.weight"], earlier["model"]["head.weight"])

    about = config_of(folder)["weights"]
    assert (about["source"], about["epoch"], about["averaged"]) == ("main.py", 1, True)


def test_init_from_at_another_resolution(tmp_path, finished):
    arguments = ["--init_from", str(finished / "last.pt"), "--img_size", "16"]
    assert run(tmp_path, *arguments) == 0
    parts = config_of(folder_of(tmp_path))["weights"]["parts"]
    assert parts["pos_embed"] == "resized, grid 4x4 to 8x8, bicubic"
    assert parts["patch_embed"] == "loaded"


def test_more_epochs_are_refused_with_a_hint(tmp_path, finished, pretrained, run_script):
    arguments = [*DIGITS, "--output_dir", str(finished.parents[2]), "--ema", "0.5"]
    arguments += ["--pretrained", str(pretrained[0])]
    assert run_script(main.main, *arguments)[0] == 0  # finished: nothing to do
    code, _, error = run_script(main.main, *arguments, "--epochs", "2")
    assert code == 2
    assert "epochs 1 there, 2 asked for" in error
    assert f"start a new run with --init_from {finished / 'last.pt'}" in error


# --------------------------------------------------------------------------------------------------
# Resuming


def interrupted(output, monkeypatch, *arguments):
    """A run of two epochs that was asked to stop after the first."""
    epochs = ["--epochs", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(main.Trainer, "stop_if_asked", stop_after_an_epoch)
        assert run(output, *arguments, *epochs) == utils.EXIT_AGAIN
    return [*arguments, *epochs]


def stop_after_an_epoch(self):
    self.stop.reason = "test"
    raise main.Stopped


def test_a_resumed_run_needs_the_file_no_more(tmp_path, monkeypatch):
    path, _ = save_timm(tmp_path / "vit.safetensors", in_chans=1, num_classes=3)
    start = ["--pretrained", str(path), "--freeze", "1", "--layer_decay", "0.7"]
    assert run(tmp_path / "straight", *start, "--epochs", "2") == 0

    arguments = interrupted(tmp_path / "parts", monkeypatch, *start)
    path.unlink()
    assert run(tmp_path / "parts", *arguments) == 0
    straight, parts = (state_of(folder_of(tmp_path / name)) for name in ("straight", "parts"))
    for name, expected in straight["model"].items():
        assert torch.equal(parts["model"][name], expected), name
    assert parts["weights"] == straight["weights"]
    assert config_of(folder_of(tmp_path / "parts"))["weights"] == straight["weights"]


def test_a_folder_belongs_to_one_file(tmp_path, finished, run_script):
    """By its content: a copy elsewhere is the same."""
    arguments = [*DIGITS, "--output_dir", str(finished.parents[2]), "--ema", "0.5"]
    original = config_of(finished)["weights"]["file"]
    copy, other = tmp_path / "copy.safetensors", tmp_path / "other.safetensors"
    copy.write_bytes(Path(original).read_bytes())
    save_timm(other)

    assert run_script(main.main, *arguments, "--pretrained", str(copy))[0] == 0
    code, _, error = run_script(main.main, *arguments, "--pretrained", str(other))
    assert code == 2
    assert f"other starting weights: {original} there, {other} as it is now asked for" in error
    code, _, error = run_script(main.main, *arguments)
    assert code == 2
    assert f"{original} there, none asked for" in error


# --------------------------------------------------------------------------------------------------
# Freezing, and learning rates by layer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("num_frozen", [0, 1, 2])
def test_frozen_layers_stay_as_they_are(tmp_path, pretrained, optimizer, num_frozen):
    path, _ = pretrained
    arguments = ["--pretrained", str(path), "--optimizer", optimizer, "--freeze", str(num_frozen)]
    assert run(tmp_path, *arguments) == 0
    trained = state_of(folder_of(tmp_path))["model"]

    frozen = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    frozen += [f"blocks.{layer}.mlp.fc1.weight" for layer in range(num_frozen)]
    moving = [f"blocks.{layer}.mlp.fc1.weight" for layer in range(num_frozen, 2)]
    start = starting.read(main.resolve_settings(main.parse_args([*DIGITS, *arguments])), None)
    model = VisionTransformer(**SIZES, in_channels=1)
    start.apply(model, num_frozen)
    first = model.state_dict()
    assert all(torch.equal(trained[name], first[name]) for name in frozen)
    assert not any(torch.equal(trained[name], first[name]) for name in [*moving, "head.weight"])


def test_no_gradient_goes_through_frozen_blocks():
    model = VisionTransformer(**SIZES)
    starting.Start().apply(model, 1)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == set(starting.frozen_names(model, 1))
    assert "blocks.0.norm1.weight" in without
    assert "blocks.1.norm1.weight" not in without


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learning_rates_fall_with_the_distance_from_the_head(optimizer):
    """Against the formula of BEiT's code: decay ** (depth + 1 - layer)."""
    settings = Settings.from_dict({"lr": 1.0, "layer_decay": 0.5, "optimizer": optimizer})
    model = VisionTransformer(**SIZES)
    built = optimizers.build_optimizers(model, settings.optimization)
    rates = {
        parameter: group["lr"]
        for one in built
        for group in one.param_groups
        for parameter in group["params"]
    }
    by_name = {name: rates[parameter] for name, parameter in model.named_parameters()}
    assert by_name["head.weight"] == by_name["norm.bias"] == 1.0
    assert by_name["blocks.1.mlp.fc1.weight"] == by_name["blocks.1.norm1.bias"] == 0.5
    assert by_name["blocks.0.mlp.fc1.weight"] == by_name["blocks.0.attn.qkv.bias"] == 0.25
    assert by_name["pos_embed"] == by_name["cls_token"] == by_name["patch_embed.proj.bias"] == 0.125
    assert built[0].param_groups[0]["lr"] == 1.0  # the one that metrics.jsonl logs


def test_without_decay_the_groups_are_as_they_were():
    """So that runs from before the flag can resume: two groups, then Muon's one."""
    settings = Settings.from_dict({"lr": 1.0, "optimizer": "muon"}).optimization
    adamw, muon = optimizers.build_optimizers(VisionTransformer(**SIZES), settings)
    assert [len(adamw.param_groups), len(muon.param_groups)] == [2, 1]


# --------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pretrained", "a.pth", "--init_from", "b.pt"], "both say what to start from"),
        (["--freeze", "1"], "needs weights that were trained: add --pretrained or --init_from"),
        (["--freeze", "3", "--pretrained", "a.pth"], "--freeze 3: the model has 2 blocks"),
        (["--layer_decay", "0"], "must be above 0"),
        (["--init_from", "a.safetensors"], "use --pretrained for it"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, run_script, arguments, words):
    code, _, error = run_script(main.main, *DIGITS, "--output_dir", str(tmp_path), *arguments)
    assert code == 2
    assert words in error
    assert len(error.splitlines()) == 1


def test_frozen_weights_must_be_in_the_file(tmp_path, run_script):
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    path, _ = save_timm(tmp_path / "vit.safetensors", **options)
    arguments = [*DIGITS, "--output_dir", str(tmp_path), "--pretrained", str(path), "--freeze", "0"]
    code, _, error = run_script(main.main, *arguments)
    assert code == 2
    assert "--freeze 0 would keep cls_token as drawn" in error


def test_a_checkpoint_of_ours_is_not_for_pretrained(tmp_path, finished, run_script):
    arguments = [*DIGITS, "--output_dir", str(tmp_path)]
    arguments += ["--pretrained", str(finished / "last.pt")]
    code, _, error = run_script(main.main, *arguments)
    assert code == 2
    assert "is a checkpoint of main.py; start from it with --init_from" in error


def test_eval_exports_a_run(tmp_path, finished, run_script):
    """What is exported are the averaged weights, which eval.py evaluates too."""
    path = tmp_path / "new folder" / "model.safetensors"
    arguments = ["--checkpoint", str(finished / "last.pt"), "--export", str(path)]
    code, output, _ = run_script(evaluation.main, *arguments)
    assert code == 0
    assert f"wrote {path}; the arguments of timm.create_model are in its metadata" in output
    exported, averaged = safetensors.torch.load_file(path), state_of(finished)["average"]
    assert exported.keys() == averaged.keys()
    assert all(torch.equal(exported[name], averaged[name]) for name in averaged)
