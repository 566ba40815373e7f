"""Masks that differ by layer, registers and masks in files: the model, and a run to its report."""

import json

import numpy as np
import pytest
import timm
import torch

import attention
import eval as evaluation
import main
import masks
import models
import plot_result
import utils
from analysis import receptive_field
from analysis.attention_maps import watch_attention
from analysis.observers import AttentionMeasures
from masks import MaskSpec
from models import VisionTransformer
from report import logs, results
from training import building, checkpoints

GRID = (3, 4)
SMALL = {
    "img_size": (6, 8),
    "patch_size": 2,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "dropout": 0.0,
}


def make_model(spec, **options):
    torch.manual_seed(0)
    masks_of_layers = spec.build_layers(*GRID, SMALL["depth"])
    return VisionTransformer(**SMALL, attention_mask=masks_of_layers, **options).eval()


def make_images(number=2):
    return torch.randn(number, 3, 6, 8, generator=torch.Generator().manual_seed(1))


WINDOWS = MaskSpec("2d_window", 1, global_layers=(3,))


# -------------------------------------------------------------------------------------------------
# The model


def test_each_different_mask_is_compiled_once():
    model = make_model(WINDOWS)
    compiled = model.layer_masks
    assert compiled[0] is compiled[2]
    assert len({id(one) for one in compiled}) == len(compiled.different) == 3
    assert compiled[3].mask is None
    assert [compiled.num_layers_with(one) for one in compiled.different] == [2, 1, 1]
    with pytest.raises(ValueError, match="3 different masks"):
        _ = model.compiled_mask
    assert make_model(MaskSpec("2d_circle", 1)).compiled_mask.mask is not None

    # Equal masks that are different tensors, as from somebody's own code.
    twins = [torch.eye(12, dtype=torch.bool) for _ in range(4)]
    assert len(VisionTransformer(**SMALL, attention_mask=twins).layer_masks.different) == 1


def test_masks_must_fit_the_depth_and_the_grid():
    with pytest.raises(ValueError, match="masks for 3 layers, but the model has 4"):
        VisionTransformer(**SMALL, attention_mask=[None] * 3)
    with pytest.raises(ValueError, match=r"needs \[12, 12\]"):
        VisionTransformer(**SMALL, attention_mask=[None, None, None, torch.ones(9, 9).bool()])


@pytest.mark.parametrize("pool", models.POOLS)
@pytest.mark.parametrize("num_registers", [0, 3])
@pytest.mark.parametrize("backend", ["native", "diagonal", "auto"])
def test_every_layer_attends_under_its_own_mask(backend, num_registers, pool):
    """Logits and gradients are those of dense attention, and that is a masked softmax."""
    options = {"num_registers": num_registers, "pool": pool}
    dense = make_model(WINDOWS, backend="dense", **options)
    model = make_model(WINDOWS, backend=backend, **options)
    images = make_images()
    expected, found = dense(images), model(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    for one, other in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)

    num_global = num_registers + (pool == "cls")
    seen = {}
    with torch.no_grad(), watch_attention(model, seen.__setitem__):
        model(images)
    for layer, probabilities in seen.items():
        mask = WINDOWS.build(*GRID, layer)
        allowed = torch.ones(num_global + 12, num_global + 12, dtype=torch.bool)
        if mask is not None:
            allowed[num_global:, num_global:] = mask
        assert torch.equal(probabilities > 0, allowed.expand_as(probabilities)), layer


@pytest.mark.parametrize(("pool", "global_pool"), [("cls", "token"), ("mean", "avg")])
def test_registers_are_those_of_timm(pool, global_pool):
    ours = VisionTransformer(**SMALL, pool=pool, num_registers=3).eval()
    theirs = timm.models.VisionTransformer(
        **{
            key: SMALL[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
        },
        num_classes=10,
        reg_tokens=3,
        class_token=pool == "cls",
        global_pool=global_pool,
        fc_norm=False,
    ).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(make_images()), theirs(make_images()))


def test_without_registers_the_weights_are_drawn_as_before():
    plain, with_registers = (
        VisionTransformer(**SMALL, num_registers=number).state_dict() for number in seeded((0, 2))
    )
    assert set(with_registers) - set(plain) == {"reg_token"}
    for name, value in plain.items():
        if name != "pos_embed":
            assert torch.equal(value, with_registers[name]), name


def seeded(values):
    for value in values:
        torch.manual_seed(0)
        yield value


def test_flops_and_neighbors_are_summed_over_the_layers():
    model = make_model(WINDOWS, num_registers=2, pool="mean")
    pairs, neighbors = 0, []
    for layer in range(4):
        mask = WINDOWS.build(*GRID, layer)
        number = 144 if mask is None else int(mask.sum())
        neighbors.append(number / 12)
        pairs += number + 2 * 12 * 2 + 2 * 2
    assert model.layer_masks.mean_neighbors(12) == pytest.approx(np.mean(neighbors))
    assert models.count_forward_flops(model)["attention"] == 2 * 2 * pairs * 16


def test_a_receptive_field_is_what_the_layers_can_reach():
    spec = MaskSpec("2d_window", 1)
    torch.manual_seed(0)
    config = SMALL | {"img_size": (12, 14), "depth": 2}
    layers = spec.build_layers(6, 7, 2)
    model = VisionTransformer(**config, pool="mean", attention_mask=layers).eval()
    field = receptive_field.receptive_field(model, torch.randn(1, 3, 12, 14), (2, 3))
    seen = field[0].unfold(0, 2, 2).unfold(1, 2, 2).sum((-1, -2)) > 0  # [6, 7]
    expected = masks.reachable(spec.build_layer_arrays(6, 7, 2), 2)[2 * 7 + 3]
    np.testing.assert_array_equal(seen.flatten().numpy(), expected)
    assert not expected.all()


def test_measures_follow_the_layers_and_leave_registers_out():
    model = make_model(WINDOWS, num_registers=2, pool="mean")
    for block in model.blocks:  # uniform attention
        torch.nn.init.zeros_(block.attn.qkv.weight)
    found = AttentionMeasures(model, patch_token=2 + 5)
    with torch.no_grad(), watch_attention(model, found.see):
        model(make_images())
    numbers = found.numbers()
    for layer in range(4):
        uniform = numbers["distance_uniform_by_layer"][layer]
        np.testing.assert_allclose(numbers["distance"][layer], uniform, rtol=1e-5)
        np.testing.assert_allclose(numbers["entropy"][layer], 1.0, rtol=1e-5)
    ceilings = numbers["distance_ceiling_by_layer"]
    assert ceilings[3] > ceilings[0] == ceilings[2]
    assert numbers["distance_ceiling"] == pytest.approx(np.mean(ceilings))
    assert numbers["class_token_share"] is None
    assert found.arrays()["rollout"].shape == GRID


def test_a_model_compiles_around_masks_that_differ():
    model = make_model(WINDOWS, num_registers=1)
    expected = model(make_images())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(make_images()), expected)


# -------------------------------------------------------------------------------------------------
# Runs

DIGITS = [
    *("--dataset", "digits", "--model", "vit_micro", "--img_size", "8", "--patch_size", "2"),
    *("--device", "cpu", "--batch_size", "512", "--lr", "2e-3", "--pool", "mean"),
]
LAYERED = ["--mask_type", "2d_window", "--global_layers", "3", "--num_registers", "2"]
LAYERED_NAME = "2d_window_expansion_1_global_3_registers_2"


def run(output, *arguments):
    return main.main([*DIGITS, "--output_dir", str(output), *arguments])


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Runs of two epochs of full attention and of windows, both with registers."""
    output = tmp_path_factory.mktemp("runs")
    for arguments in (["--num_registers", "2"], LAYERED):
        assert run(output, *arguments, "--epochs", "2") == 0
    return output


def test_a_run_records_its_layers_and_is_found_again(output, capsys):
    folder = output / "digits" / LAYERED_NAME / "seed_0"
    config = utils.read_json(folder / utils.CONFIG)
    about = config["attention"]
    assert [mask["layers"] for mask in about["masks"]] == [[0, 2], [1], [3]]
    spec = MaskSpec("2d_window", 1, global_layers=(3,))
    sizes = [16 if m is None else int(m.sum()) / 16 for m in spec.build_layers(4, 4, 4)]
    assert about["num_neighbors_mean"] == pytest.approx(np.mean(sizes))
    assert about["num_neighbors_nominal"] == 9
    assert config["settings"]["global_layers"] == "3"
    assert (folder / utils.MASK_PICTURE).stat().st_size > 5000
    assert run(output, *LAYERED, "--epochs", "2") == 0
    assert "nothing to do" in capsys.readouterr().out

    model = checkpoints.rebuild_model(checkpoints.load_checkpoint(folder / utils.CHECKPOINT))
    assert model.reg_token.shape == (1, 2, 64)
    assert len(model.layer_masks.different) == 3


def test_the_report_compares_runs_with_as_many_registers(output, tmp_path):
    assert run(output, "--epochs", "2") == 0  # full attention without registers
    rows = results.group_by_pattern(logs.load_runs(output))
    assert [row.label for row in rows] == [
        "full",
        "full, 2 registers",
        "2d_window, step 1, full in layer 3, 2 registers",
    ]
    assert all(row.is_named_by_default for row in rows)
    assert plot_result.main(["--results_path", str(output / "digits")]) == 0
    page = (output / "digits" / "results.html").read_text()
    data = json.loads(page.split('id="mask-data">')[1].split("</script>")[0])
    assert data["layers"][-1] == [1, 2, 1, 0]
    assert data["matrices"][0] is None


def test_an_analysis_of_layers_is_drawn(output):
    checkpoint = output / "digits" / LAYERED_NAME / "seed_0" / utils.CHECKPOINT
    assert evaluation.main(["--checkpoint", str(checkpoint), "--analyze", "--limit", "8"]) == 0
    numbers = utils.read_json(checkpoint.with_name("analysis_test.json"))
    assert numbers["maps_of"] == "patch"
    assert numbers["global_layers"] == "3"
    assert len(numbers["distance_ceiling_by_layer"]) == 4
    assert plot_result.main(["--results_path", str(output / "digits")]) == 0


def test_a_run_goes_on_with_the_backends_it_began_with(output, tmp_path):
    settings = main.resolve_settings(main.parse_args([*DIGITS, *LAYERED]))
    model = building.build_model(settings, 1, 10)
    recorded = [
        {"backend": name, "backend_reason": "then"} for name in ("dense", "native", "dense")
    ]
    device = torch.device("cpu")
    choices = building.recorded_choices({"masks": recorded}, model, settings, device)
    model.layer_masks.apply_choices(choices)
    assert [compiled.backend for compiled in model.layer_masks] == ["dense", "native"] + [
        "dense"
    ] * 2
    assert model.layer_masks.backend == "dense and native"


@pytest.mark.parametrize(
    ("backend", "device", "problem"),
    [
        ("native", "cuda", "runs on the CPU, not on cuda"),
        ("tiled", "cpu", "runs on CUDA, not on cpu"),
        ("diagonal", "cpu", "is slow on a CPU now"),
        ("dense", "cuda", None),
    ],
)
def test_a_run_goes_on_elsewhere_with_another_backend_if_it_must(backend, device, problem, capsys):
    """If `auto` chose the one it began with; one that was asked for stays."""
    arguments = [*DIGITS, "--mask_type", "2d_cardinal"]
    settings = main.resolve_settings(main.parse_args(arguments))
    (compiled,) = building.build_model(settings, 1, 10).layer_masks.different
    about = {"backend": backend, "backend_reason": "then"}
    choice = building.recorded_choice(about, compiled, settings, torch.device(device))
    assert (choice.backend == backend) == (problem is None)
    expected = f"attention goes on with backend {choice.backend}: {backend} {problem}\n"
    assert capsys.readouterr().out == ("" if problem is None else expected)

    settings = main.resolve_settings(main.parse_args([*arguments, "--backend", backend]))
    choice = building.recorded_choice(about, compiled, settings, torch.device(device))
    assert choice.backend == backend


def test_a_checkpoint_keeps_the_mask_of_a_file(tmp_path):
    mask = np.tri(16, dtype=bool)
    path = tmp_path / "mine.npy"
    np.save(path, mask)
    arguments = ["--mask_file", str(path), "--global_layers", "0", "--epochs", "1"]
    assert run(tmp_path, *arguments) == 0
    (folder,) = (tmp_path / "digits").glob("file_mine_*/seed_0")
    path.unlink()

    state = checkpoints.load_checkpoint(folder / utils.CHECKPOINT)
    with pytest.raises(ValueError, match="is for the 4x4 grid of patches in training, not for 2x8"):
        checkpoints.rebuild_model(state, img_size=(4, 16))  # as many patches, elsewhere
    model = checkpoints.rebuild_model(state)
    assert model.layer_masks[0].mask is None
    assert torch.equal(model.layer_masks[1].mask, torch.from_numpy(mask))
    # 2x8 patches are as many as 4x4, but not those that the mask is for.
    state = checkpoints.load_checkpoint(folder / utils.CHECKPOINT)
    with pytest.raises(ValueError, match="for the 4x4 grid of patches in training"):
        checkpoints.rebuild_model(state, img_size=(4, 16))
    (row,) = results.group_by_pattern(logs.load_runs(tmp_path))
    assert not row.mask.is_known, "the file is gone"
    assert row.label == "mine.npy, full in layer 0"
    assert row.is_named_by_default


def test_seeds_of_one_mask_are_one_row_wherever_its_file_lies(tmp_path):
    for seed in (0, 1):
        path = tmp_path / f"place_{seed}" / "mine.npy"
        path.parent.mkdir()
        np.save(path, np.tri(16, dtype=bool))
        arguments = ["--mask_file", str(path), "--seed", str(seed), "--epochs", "1"]
        assert run(tmp_path, *arguments) == 0
    (row,) = results.group_by_pattern(logs.load_runs(tmp_path))
    assert [found.seed for found in row.runs] == [0, 1]


def test_what_uses_no_layer_masks_still_counts_them():
    assert attention.LayerMasks([None, None]).mean_neighbors(7) == 7
