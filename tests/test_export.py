"""What eval.py exports gives the same logits in timm, ONNX Runtime and torch.export."""

import json

import onnxruntime
import pytest
import safetensors
import timm
import torch
from test_weights import randomize

import eval as evaluation
import masks
import utils
from interop import export, weights
from models import VisionTransformer

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
IMG_SIZE = (24, 40)
DATA = {"mean": [0.5], "std": [0.2], "class_names": [*"abcdefg"]}
SETTINGS = {"mask_type": "2d_cardinal", "expansion_step": 1}
MASK = masks.generate_2d_attention_mask_cardinal(1, 3, 5)


def make_model(pool="cls", mask=None, **changed):
    config = SMALL | {"img_size": IMG_SIZE, "pool": pool, "dropout": 0.1} | changed
    return randomize(VisionTransformer(**config, attention_mask=mask, backend="dense"))


def images_of(number):
    return torch.randn(number, 3, *IMG_SIZE, generator=torch.Generator().manual_seed(number))


def metadata_of(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_timm_loads_it_strictly(tmp_path, pool):
    model, path = make_model(pool), tmp_path / "model.safetensors"
    (line,) = export.write(path, model, DATA, {"mask_type": "full", "expansion_step": None})
    assert str(path) in line
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]

    metadata = metadata_of(path)
    theirs = timm.create_model(**metadata["timm"], checkpoint_path=str(path)).eval()
    theirs.load_state_dict(safetensors.torch.load_file(path), strict=True)
    images = images_of(3)
    torch.testing.assert_close(theirs(images), model(images), rtol=1e-5, atol=1e-5)
    assert metadata["notes"]["mean"] == [0.5]
    assert metadata["notes"]["class_names"] == [*"abcdefg"]


def test_what_timm_cannot_do_is_said(tmp_path):
    model = make_model(mask=MASK, norm_eps=1e-12)
    lines = export.write(tmp_path / "model.safetensors", model, DATA, SETTINGS)
    assert "timm knows no masks: without 2d_cardinal again" in lines[1]
    assert "eps 1e-12, timm's have 1e-06" in lines[2]
    assert len(export.write(tmp_path / "model.pt2", model, DATA, SETTINGS)) == 1


def test_our_own_export_comes_back(tmp_path):
    """With the rectangular grid, the number of heads and the eps, which no state dict says."""
    model, path = make_model(norm_eps=1e-12), tmp_path / "model.safetensors"
    export.write(path, model, DATA, SETTINGS)
    found, _ = weights.read_pretrained(str(path))
    assert (found.img_size, found.num_heads, found.norm_eps) == (IMG_SIZE, 3, 1e-12)

    again = VisionTransformer(**SMALL, img_size=(40, 24))
    assert "grid 3x5 to 5x3" in weights.fit(found, again).parts["pos_embed"][1]


@pytest.mark.parametrize(("pool", "mask"), [("cls", MASK), ("mean", MASK), ("cls", None)])
def test_onnx_runtime_gives_the_same_logits(tmp_path, pool, mask):
    model, path = make_model(pool, mask), tmp_path / "model.onnx"
    export.write(path, model, DATA, SETTINGS)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for number in (1, 2, 5):
        images = images_of(number)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        expected = model(images).detach()
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)

    notes = json.loads(session.get_modelmeta().custom_metadata_map["notes"])
    assert notes["mask"] == SETTINGS


@pytest.mark.parametrize(("pool", "mask"), [("cls", MASK), ("mean", None)])
def test_torch_export_gives_the_same_logits(tmp_path, pool, mask):
    model, path = make_model(pool, mask), tmp_path / "model.pt2"
    export.write(path, model, DATA, SETTINGS)
    extra = {"notes": ""}
    program = torch.export.load(path, extra_files=extra)
    for number in (1, 2, 5):
        images = images_of(number)
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-5, atol=1e-5)
    assert json.loads(extra["notes"])["img_size"] == [24, 40]


def test_the_mask_matters():
    """It changes the logits by far more than the tests above allow: they see a wrong mask."""
    full, masked = make_model(), make_model(mask=MASK)
    masked.load_state_dict(full.state_dict())
    assert (full(images_of(2)) - masked(images_of(2))).abs().max() > 1e-3


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(utils.UserError, match="needs the packages onnx and onnxscript"):
        export.write(tmp_path / "model.onnx", make_model(), DATA, SETTINGS)
    assert not any(tmp_path.iterdir())


def test_a_failed_export_keeps_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_text("before")

    def fail(state, temporary, metadata):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        export.write(path, make_model(), DATA, SETTINGS)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_wrong_requests_are_one_line(tmp_path, run_script):
    checkpoint = ["--checkpoint", str(tmp_path / "last.pt")]
    code, _, error = run_script(evaluation.main, *checkpoint, "--export", "model.npz")
    assert code == 2
    assert "the name must end in .safetensors (for timm), .onnx" in error

    code, _, error = run_script(evaluation.main, *checkpoint, "--export", "m.onnx", "--analyze")
    assert code == 2
    assert "leave out --analyze" in error

    for flags in (
        "--predict x.png",
        "--output m",
        "--split train",
        "--precision bf16",
        "--labels x",
    ):
        code, _, error = run_script(
            evaluation.main, *checkpoint, "--export", "m.pt2", *flags.split()
        )
        assert code == 2
        assert f"leave out {flags.split()[0]}" in error

    model = make_model()
    model.head.bias.data[0] = float("nan")
    with pytest.raises(utils.UserError, match="not finite; nothing was exported"):
        export.write(tmp_path / "model.pt2", model, DATA, SETTINGS)
