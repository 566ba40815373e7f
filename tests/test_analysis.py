"""What analyses measure, on models whose answer is known; `eval.py --analyze` from end to end."""

import math

import numpy as np
import pytest
import torch

import eval as evaluation
import main
import masks
import utils
from analysis import attention_maps, measures, summary
from analysis.observers import AttentionMeasures
from analysis.receptive_field import receptive_field
from attention import build
from models import VisionTransformer

GRID, PATCH_SIZE = (3, 5), 2  # rectangular: swapped axes show
NUM_PATCHES = 15
BACKENDS = ["dense", "diagonal"] + (["native"] if build.is_available() else [])
MASKS = [("full", 1), ("1d_cardinal", 1), ("2d_cardinal", 1), ("2d_all_neighbors", 1)]


def make_model(mask_type="2d_cardinal", step=1, pool="mean", depth=2, backend="dense"):
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=(GRID[0] * PATCH_SIZE, GRID[1] * PATCH_SIZE),
        patch_size=PATCH_SIZE,
        embed_dim=16,
        depth=depth,
        num_heads=2,
        pool=pool,
        attention_mask=masks.build_attention_mask(mask_type, step, *GRID),
        backend=backend,
    )
    return model.eval()


def make_images(number=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, GRID[0] * PATCH_SIZE, GRID[1] * PATCH_SIZE, generator=generator)


def make_uniform(model):
    """Every query gives the same to all keys that it may attend to."""
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
    return model


def probabilities_of(model, images):
    """Of each layer, [B, H, T, T]."""
    found = []
    with torch.no_grad(), attention_maps.watch_attention(model, lambda _, p: found.append(p)):
        model(images)
    return found


def measure(model, images):
    found = AttentionMeasures(model, patch_token=model.compiled_mask.num_global_tokens + 7)
    with torch.no_grad(), attention_maps.watch_attention(model, found.see):
        for image in images:  # one by one: means over batches are means over images
            model(image[None])
    return found


def position(patch):
    return divmod(patch, GRID[1])


def distance_between(i, j):
    (row, column), (other_row, other_column) = position(i), position(j)
    return PATCH_SIZE * math.hypot(row - other_row, column - other_column)


def neighbors_of(mask_type, step, i):
    mask = masks.build_attention_mask(mask_type, step, *GRID)
    return [j for j in range(NUM_PATCHES) if mask is None or mask[i, j]]


# --------------------------------------------------------------------------------------------------
# Probabilities


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_type", ["full", "2d_cardinal"])
def test_probabilities_times_v_are_the_models_own_attention(pool, backend, mask_type):
    model, images = make_model(mask_type, pool=pool, backend=backend), make_images()
    values, outputs = [], []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda *args: values.append(args[2]))
        block.attn.proj.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))

    found = probabilities_of(model, images)
    assert len(found) == len(outputs) == 2
    for probabilities, qkv, output in zip(found, values, outputs, strict=True):
        v = qkv.unflatten(-1, (3, 2, 8))[:, :, 2].transpose(1, 2)  # [B, H, T, D]
        ours = (probabilities @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(ours, output, atol=1e-5, rtol=1e-4)


def test_forbidden_pairs_get_exactly_nothing_and_rows_sum_to_one():
    model = make_model("2d_cardinal", pool="cls")
    allowed = torch.ones(NUM_PATCHES + 1, NUM_PATCHES + 1, dtype=torch.bool)
    allowed[1:, 1:] = masks.build_attention_mask("2d_cardinal", 1, *GRID)
    for probabilities in probabilities_of(model, make_images()):
        assert torch.equal(probabilities > 0, allowed.expand_as(probabilities))
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, 2, NUM_PATCHES + 1))


def test_probabilities_are_exact_while_the_model_runs_in_bf16():
    model, found, projected = make_model("full"), [], []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(lambda *args: projected.append(args[2]))
    watch = attention_maps.watch_attention(model, lambda _, p: found.append(p))
    with torch.no_grad(), watch, torch.autocast("cpu", dtype=torch.bfloat16):
        model(make_images())

    for probabilities, qkv in zip(found, projected, strict=True):
        assert qkv.dtype == torch.bfloat16
        q, k, _ = qkv.double().unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        exact = (q @ k.mT / 8**0.5).softmax(-1)
        torch.testing.assert_close(probabilities.double(), exact, atol=1e-6, rtol=1e-5)


def test_nothing_stays_hooked():
    model, calls = make_model(), []
    with attention_maps.watch_attention(model, lambda *_: calls.append(1)):
        model(make_images())
    model(make_images())
    assert len(calls) == 2


def test_as_many_images_at_once_as_fit():
    model = make_model(pool="cls")
    bytes_per_image = 4 * 2 * 16 * 16
    assert attention_maps.images_at_once(model, 10 * bytes_per_image) == 10
    assert attention_maps.images_at_once(model, 1) == 1


# --------------------------------------------------------------------------------------------------
# Distance and entropy


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(("mask_type", "step"), MASKS)
def test_uniform_attention_has_the_distance_of_its_mask(mask_type, step, pool):
    model = make_uniform(make_model(mask_type, step, pool))
    numbers = measure(model, make_images()).numbers()

    means, largest = [], []
    for i in range(NUM_PATCHES):
        reach = [distance_between(i, j) for j in neighbors_of(mask_type, step, i)]
        means.append(sum(reach) / len(reach))
        largest.append(max(reach))
    uniform, ceiling = sum(means) / NUM_PATCHES, sum(largest) / NUM_PATCHES

    assert numbers["distance_uniform"] == pytest.approx(uniform)
    assert numbers["distance_ceiling"] == pytest.approx(ceiling)
    np.testing.assert_allclose(numbers["distance"], uniform, rtol=1e-5)
    np.testing.assert_allclose(numbers["entropy"], 1, rtol=1e-5)

    if pool == "mean":
        assert numbers["class_token_share"] is numbers["class_token_entropy"] is None
        return
    counts = [len(neighbors_of(mask_type, step, i)) for i in range(NUM_PATCHES)]
    share = sum(1 / (count + 1) for count in counts) / NUM_PATCHES
    np.testing.assert_allclose(numbers["class_token_share"], share, rtol=1e-5)
    np.testing.assert_allclose(numbers["class_token_entropy"], 1, rtol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("offset", [(0, 1), (1, 0), (2, 3), (0, 0)])
def test_a_head_that_looks_at_one_offset(offset, pool):
    """All attention goes to the patch at this offset from the query, wrapping around the grid."""
    num_global = 1 if pool == "cls" else 0
    probabilities = torch.zeros(1, 1, NUM_PATCHES + num_global, NUM_PATCHES + num_global)
    distances = []
    for i in range(NUM_PATCHES):
        row, column = position(i)
        other = (row + offset[0]) % GRID[0] * GRID[1] + (column + offset[1]) % GRID[1]
        probabilities[0, 0, i + num_global, other + num_global] = 1.0
        distances.append(distance_between(i, other))

    table = measures.patch_distances(GRID, PATCH_SIZE)
    found = measures.attention_distance(probabilities, table).item()
    assert found == pytest.approx(sum(distances) / NUM_PATCHES)
    num_keys = torch.full((NUM_PATCHES + num_global,), NUM_PATCHES)
    assert measures.normalized_entropy(probabilities, num_keys).item() == 0


def test_a_layer_with_a_fixed_offset_built_by_hand():
    """Queries and keys that are codes of positions make each patch look at its left neighbor."""
    model = make_model("full", depth=1)
    attention = model.blocks[0].attn
    model.blocks[0].norm1 = torch.nn.Identity()
    model.pos_embed.data = torch.eye(NUM_PATCHES, 16)[None]  # patch i is the i-th unit vector
    torch.nn.init.zeros_(model.patch_embed.proj.weight)

    # Both heads, of 8 channels, get the bits of the patch as signs, from the key's own position and
    # the query's left neighbor (or its own in the first column).
    bits = torch.tensor(
        [[1.0 if patch >> bit & 1 else -1.0 for bit in range(8)] for patch in range(16)]
    )
    left = torch.tensor([patch - (position(patch)[1] > 0) for patch in range(16)])
    weight = torch.zeros(3, 2, 8, 16)
    weight[0], weight[1] = 100 * bits[left].T, bits.T
    attention.qkv.weight.data = weight.flatten(0, 2)

    numbers = measure(model, make_images()).numbers()
    moved = GRID[0] * (GRID[1] - 1) / NUM_PATCHES  # share of the patches with a left neighbor
    np.testing.assert_allclose(numbers["distance"], moved * PATCH_SIZE, rtol=1e-4)
    np.testing.assert_allclose(numbers["entropy"], 0, atol=1e-4)


def test_entropy_is_that_of_the_definition_by_loops():
    model = make_model("1d_cardinal", 1, pool="cls")
    images = make_images()
    numbers = measure(model, images).numbers()
    for layer, probabilities in enumerate(probabilities_of(model, images)):
        for head in range(2):
            entropies = []
            for image in range(3):
                for i in range(NUM_PATCHES):
                    row = probabilities[image, head, i + 1].tolist()
                    num_keys = len(neighbors_of("1d_cardinal", 1, i)) + 1
                    entropy = -sum(p * math.log(p) for p in row if p > 0)
                    entropies.append(entropy / math.log(num_keys))
            expected = sum(entropies) / len(entropies)
            assert numbers["entropy"][layer][head] == pytest.approx(expected, rel=1e-4)


def test_a_query_with_one_key_has_no_entropy():
    numbers = measure(make_model("2d_cardinal", 0), make_images()).numbers()
    assert numbers["entropy"] == [[None, None], [None, None]]
    assert numbers["distance"] == [[0.0, 0.0], [0.0, 0.0]]
    assert numbers["distance_ceiling"] == 0


def test_queries_that_give_all_to_the_class_token_do_not_count():
    probabilities = torch.zeros(1, 1, 3, 3)
    probabilities[..., 0] = 1.0
    distances = measures.patch_distances((1, 2), 4)
    assert measures.attention_distance(probabilities, distances).isnan().all()
    probabilities[0, 0, 1] = torch.tensor([0.5, 0.25, 0.25])
    assert measures.attention_distance(probabilities, distances).item() == 2.0


# --------------------------------------------------------------------------------------------------
# Rollout and receptive field


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("mask_type", ["full", "2d_cardinal"])
def test_rollout_of_uniform_attention_is_a_power_of_the_normalized_mask(mask_type, pool):
    model = make_uniform(make_model(mask_type, pool=pool, depth=3))
    arrays = measure(model, make_images()).arrays()

    first = 1 if pool == "cls" else 0
    allowed = np.ones((NUM_PATCHES + first, NUM_PATCHES + first))
    if mask_type != "full":
        allowed[first:, first:] = masks.build_attention_mask(mask_type, 1, *GRID)
    attention = allowed / allowed.sum(1, keepdims=True)
    rollout = np.linalg.matrix_power((attention + np.eye(len(attention))) / 2, 3)

    read = rollout[0, 1:] if pool == "cls" else rollout.mean(0)
    np.testing.assert_allclose(arrays["rollout"], read.reshape(GRID), rtol=1e-4)
    of_patch = rollout[7 + first, first:].reshape(GRID)
    np.testing.assert_allclose(arrays["rollout_patch"], of_patch, rtol=1e-4)


def test_rollout_multiplies_later_layers_from_the_left():
    one, other = (p.double() for p in torch.rand(2, 1, 2, 4, 4).softmax(-1))
    found = measures.rollout_step(measures.rollout_step(None, one), other)[0]
    steps = [(p[0].mean(0) + torch.eye(4, dtype=p.dtype)) / 2 for p in (one, other)]
    torch.testing.assert_close(found, steps[1] @ steps[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("mask_type", ["1d_cardinal", "2d_cardinal", "2d_all_neighbors"])
def test_the_receptive_field_of_k_layers_is_the_neighborhood_of_k_steps(mask_type, depth, backend):
    model = make_model(mask_type, depth=depth, backend=backend)
    mask = masks.build_attention_mask(mask_type, 1, *GRID)
    reached = masks.reachable(mask, depth)
    for patch in ((1, 2), (0, 0), (2, 4)):
        field = receptive_field(model, make_images(), patch).sum(0)  # [h, w]
        blocks = field.unfold(0, PATCH_SIZE, PATCH_SIZE).unfold(1, PATCH_SIZE, PATCH_SIZE)
        is_seen = blocks.sum((-1, -2)) > 0  # [gh, gw]
        expected = reached[patch[0] * GRID[1] + patch[1]].reshape(GRID)
        np.testing.assert_array_equal(is_seen.numpy(), expected)
        assert (blocks[torch.from_numpy(expected)] > 0).all()  # each pixel of a patch that is seen


def test_with_a_class_token_two_layers_see_everything():
    for depth, sees_all in ((1, False), (2, True)):
        model = make_model("2d_cardinal", pool="cls", depth=depth)
        field = receptive_field(model, make_images(), (0, 0)).sum(0)
        assert bool((field > 0).all()) is sees_all


def test_the_receptive_field_is_the_gradient_of_the_patchs_token():
    model, images = make_model(pool="cls"), make_images().double()
    model = model.double()

    def token(pixels):
        caught = []
        handle = model.blocks[-1].register_forward_hook(lambda *args: caught.append(args[2]))
        with torch.no_grad():
            model(pixels)
        handle.remove()
        return caught[0][:, 1 + 1 * GRID[1] + 3].sum(-1)  # [B]

    row, column, step = 3, 4, 1e-5
    slopes = []
    for channel in range(3):
        change = torch.zeros_like(images)
        change[:, channel, row, column] = step
        slopes.append((token(images + change) - token(images - change)) / (2 * step))
    field = receptive_field(model, images, (1, 3))[:, row, column]
    torch.testing.assert_close(field, torch.stack(slopes).abs().mean(0), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_backend_gives_the_same(backend):
    images = make_images()
    for pool in ("cls", "mean"):
        dense, other = (make_model("2d_cardinal", pool=pool, backend=b) for b in ("dense", backend))
        one, two = measure(dense, images), measure(other, images)
        for name in ("distance", "entropy"):
            np.testing.assert_allclose(one.numbers()[name], two.numbers()[name], rtol=1e-4)
        np.testing.assert_allclose(one.arrays()["rollout"], two.arrays()["rollout"], rtol=1e-4)
        fields = [receptive_field(model, images, (1, 2)) for model in (dense, other)]
        torch.testing.assert_close(*fields, rtol=1e-3, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Which images


def test_a_limit_is_spread_over_the_images():
    assert summary.spread_indices(10, None).tolist() == [*range(10)]
    assert summary.spread_indices(10, 20).tolist() == [*range(10)]
    assert summary.spread_indices(10, 4).tolist() == [0, 2, 5, 7]
    assert summary.spread_indices(3, 1).tolist() == [0]


def test_the_first_image_of_each_class_is_shown():
    labels = torch.tensor([2, 2, 0, 2, 1, 0])
    chosen = summary.choose_images(labels, torch.arange(6), None)
    assert chosen.tolist() == [0, 2, 4]
    chosen = summary.choose_images(labels, torch.tensor([1, 3, 5]), None)
    assert chosen.tolist() == [1, 5]
    many = summary.choose_images(torch.arange(50), torch.arange(50), None)
    assert many.tolist() == [*range(8)]


# --------------------------------------------------------------------------------------------------
# eval.py --analyze


def train(folder, *arguments):
    shape = ["--model", "vit_micro", "--img_size", "8", "--patch_size", "2", "--depth", "2"]
    options = ["--dataset", "digits", *shape, "--batch_size", "512", "--epochs", "1"]
    output = ["--device", "cpu", "--output_dir", str(folder)]
    assert main.main([*options, *output, *arguments]) == 0
    (checkpoint,) = folder.rglob("last.pt")
    return checkpoint


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    return train(folder, "--mask_type", "2d_cardinal", "--pool", "mean", "--holdout", "0.1")


@pytest.fixture(scope="module")
def with_class_token(tmp_path_factory):
    return train(tmp_path_factory.mktemp("cls"), "--pool", "cls")


def analyze(checkpoint, output, *arguments):
    options = ["--checkpoint", str(checkpoint), "--device", "cpu", "--output", str(output)]
    assert evaluation.main([*options, "--analyze", *arguments]) == 0
    with np.load(output.with_suffix(".npz")) as arrays:
        return utils.read_json(output), dict(arrays)


def test_an_analysis_is_written_beside_the_checkpoint(local, capsys):
    options = ["--checkpoint", str(local), "--device", "cpu", "--backend", BACKENDS[-1]]
    assert evaluation.main([*options, "--analyze", "--limit", "100"]) == 0
    out = capsys.readouterr().out
    assert "mean attention distance in pixels" in out
    assert "layer  0: distance" in out
    report = utils.read_json(local.with_name("analysis_test.json"))
    assert (report["num_images"], report["num_images_in_split"]) == (100, 360)
    assert report["arrays"] == "analysis_test.npz"
    assert report["backend"] == BACKENDS[-1]
    assert report["command"].startswith("python ")
    assert report["command"].endswith("--analyze --limit 100")
    assert local.with_name("analysis_test.npz").exists()


def test_an_analysis_without_a_class_token(local, tmp_path):
    report, arrays = analyze(local, tmp_path / "a.json")
    final = utils.read_json(local.with_name("summary.json"))["final"]
    assert final["eval_split"] != report["split"] == "test"
    assert report["num_images"] == sum(report["per_class_images"]) == 360
    assert (report["grid"], report["patch"], report["maps_of"]) == ([4, 4], [2, 2], "patch")
    assert (report["mask_type"], report["pool"], report["epoch"]) == ("2d_cardinal", "mean", 1)
    assert report["class_token_share"] is None
    assert np.shape(report["distance"]) == np.shape(report["entropy"]) == (2, 4)
    assert 0 < np.min(report["distance"]) < np.max(report["distance"]) <= report["distance_ceiling"]

    shapes = {name: array.shape for name, array in arrays.items()}
    assert report["array_shapes"] == {name: list(shape) for name, shape in shapes.items()}
    n = len(report["images"])
    assert shapes == {
        "receptive_field": (8, 8),
        "rollout": (4, 4),
        "rollout_patch": (4, 4),
        "maps": (n, 2, 4, 4, 4),
        "rollout_images": (n, 4, 4),
        "images": (n, 8, 8, 1),
    }
    assert arrays["maps"].dtype == np.float16
    assert arrays["images"].dtype == np.uint8
    assert n == 8 == len({image["label"] for image in report["images"]})

    mask = masks.build_attention_mask("2d_cardinal", 1, 4, 4)
    seen = np.broadcast_to(mask[10].reshape(4, 4), arrays["maps"].shape)
    np.testing.assert_array_equal(arrays["maps"] > 0, seen)
    field = arrays["receptive_field"].reshape(4, 2, 4, 2).sum((1, 3)) > 0
    np.testing.assert_array_equal(field, masks.reachable(mask, 2)[10].reshape(4, 4))
    np.testing.assert_allclose(arrays["rollout"].sum(), 1, rtol=1e-5)


def test_the_split_and_the_accuracies_are_those_of_the_evaluation(local, tmp_path):
    split = ["--split", "holdout"]
    report, _ = analyze(local, tmp_path / "a.json", *split, "--batch_size", "30")
    final = utils.read_json(local.with_name("summary.json"))["final"]
    assert report["top1_accuracy"] == pytest.approx(final["eval_accuracy"])
    options = ["--checkpoint", str(local), "--device", "cpu", *split]
    assert evaluation.main([*options, "--output", str(tmp_path / "e.json")]) == 0
    evaluated = utils.read_json(tmp_path / "e.json")
    assert report["per_class_accuracy"] == evaluated["per_class_accuracy"]
    assert report["loss"] == pytest.approx(evaluated["loss"], rel=1e-5)


def test_an_analysis_with_a_class_token_and_chosen_images(with_class_token, tmp_path):
    images = ["--limit", "40", "--images", "5,0,359"]
    report, arrays = analyze(with_class_token, tmp_path / "a.json", *images)
    assert report["maps_of"] == "class token"
    assert [image["index"] for image in report["images"]] == [5, 0, 359]
    assert np.shape(report["class_token_share"]) == (2, 4)
    share_of_patches = arrays["maps"].astype(np.float64).sum((-1, -2))
    assert (share_of_patches < 1).all()  # the rest stays on the class token
    assert (arrays["receptive_field"] > 0).all()

    other, of_patch = analyze(with_class_token, tmp_path / "b.json", *images, "--patch", "0x3")
    assert (other["maps_of"], other["patch"]) == ("patch", [0, 3])
    assert not np.array_equal(of_patch["maps"], arrays["maps"])
    assert other["distance"] == report["distance"]
    largest = np.unravel_index(of_patch["receptive_field"].argmax(), (8, 8))
    assert (largest[0] // 2, largest[1] // 2) == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--analyze", "--limit", "0"], 2, "--limit: must be at least 1, got 0"),
        (["--analyze", "--patch", "4x0"], 2, "--patch 4x0 lies outside the 4x4 grid"),
        (["--analyze", "--patch", "1"], 2, "expected two integers"),
        (["--analyze", "--images", "0,360"], 2, "--images 360: the split has 360 images"),
        (["--analyze", "--images", "0,-1"], 2, "expected numbers of images like 0,5,7"),
        (["--analyze", "--images", ""], 2, "expected numbers of images like 0,5,7"),
        (["--limit", "5"], 2, "--limit needs --analyze"),
        (["--images", "5"], 2, "--images needs --analyze"),
        (["--analyze", "--output", "x.npz"], 2, "must end in .json"),
        (["--analyze", "--checkpoint", "none.pt"], 1, "no checkpoint at none.pt"),
    ],
)
def test_what_cannot_be_analyzed_ends_in_one_line(local, arguments, code, words, run_script):
    options = ["--checkpoint", str(local), "--device", "cpu"]
    exit_code, out, err = run_script(evaluation.main, *options, *arguments)
    assert (exit_code, out) == (code, "")
    assert words in err
    assert len(err.splitlines()) == 1
