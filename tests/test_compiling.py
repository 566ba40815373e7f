"""What is compiled, and how often: counted with a compiler that only counts, or without one."""

import pytest
import test_train
import torch
import torch.distributed as dist
from test_train import assert_close, folder_of, run

import attention
import masks
from attention import diagonal
from models import VisionTransformer
from runtime import distributed

COMPILE = torch.compile


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile was given, which then run as they are."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    def count(function, **options):
        return COMPILE(function, dynamic=False, backend=backend)

    monkeypatch.setattr(torch, "compile", count)
    monkeypatch.setattr(diagonal, "compile_error", lambda device: None)
    return found


@pytest.fixture
def group(monkeypatch, tmp_path):
    """A process group of this process alone, which believes to be one of two."""
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    yield
    dist.destroy_process_group()


reference = test_train.reference

MASK = "--mask_type 2d_cardinal --expansion_step 1"


@pytest.mark.parametrize(
    ("options", "num_graphs"),
    [
        ("", 2),  # training and evaluation
        ("--precision bf16", 2),
        (f"{MASK} --ema 0.9 --grad_accumulation 3", 2),
        ("--drop_path 0.3", 4),  # the first block never drops
        ("--checkpoint_activations", 2),
    ],
)
def test_one_block_is_compiled_once_for_all_blocks_and_batches(
    tmp_path, graphs, options, num_graphs
):
    """Four blocks, two epochs; the last batches of an epoch and of an evaluation are smaller."""
    assert run(tmp_path, "--compile", "default", *options.split()) == 0
    assert len(graphs) == num_graphs


def test_padded_batches_train_and_evaluate_as_others(tmp_path, reference, graphs):
    assert run(tmp_path, *test_train.STRONG, "--compile", "default") == 0
    assert graphs
    assert_close(folder_of(tmp_path), reference)


def test_many_models_are_compiled_in_one_process(graphs):
    """Dynamo gives up on a function that it has compiled eight times."""
    images = torch.zeros(2, 3, 8, 8)
    for width in range(8, 32, 2):
        model = VisionTransformer(8, 4, embed_dim=width, depth=2, num_heads=2)
        model.compile_blocks("default")
        model(images)
    assert len(graphs) == 12


def test_many_kinds_of_blocks_are_compiled_in_one_model(graphs):
    """Three masks, frozen blocks, one that never drops, and the evaluation of each."""
    spec = masks.MaskSpec("2d_window", 1, global_layers=(4, 5))
    config = {"embed_dim": 8, "depth": 8, "num_heads": 2, "drop_path": 0.3}
    model = VisionTransformer(24, 4, **config, attention_mask=spec.build_layers(6, 6, 8))
    for block in model.blocks[:3]:
        block.requires_grad_(False)
    model.compile_blocks("default")

    images = torch.zeros(2, 3, 24, 24)
    model(images)
    num_trained = len(graphs)
    with torch.no_grad():
        model.eval()(images)
    assert (num_trained, len(graphs)) == (6, 12)


def test_diagonals_are_compiled_once_with_and_without_autocast_and_gradients(graphs, monkeypatch):
    monkeypatch.setattr(diagonal, "EAGER_DEVICES", ())
    monkeypatch.setattr(diagonal, "can_compile", lambda device: True)
    diagonal.compile_for.cache_clear()
    diagonal._KERNELS.clear()

    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 5)
    compiled = attention.compile_mask(mask, 1, "diagonal")
    qkv = torch.randn(2, 16, 3, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    for enabled in (False, True):
        with torch.autocast("cpu", enabled=enabled):
            out = attention.attend_packed(qkv, compiled)
            with torch.no_grad():
                attention.attend_packed(qkv, compiled)
        out.float().sum().backward()
    assert len(graphs) == 2  # forward and backward
    diagonal.compile_for.cache_clear()
    diagonal._KERNELS.clear()


def test_gradients_are_exchanged_while_earlier_blocks_are_computed(group, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: COMPILE(function, backend="aot_eager")
    )
    model = VisionTransformer(8, 4, embed_dim=192, depth=3, num_heads=2, dropout=0.0)
    model.compile_blocks("default")
    run_block, events = model.run_block, []

    def watched(block, x, *arguments):
        number = list(model.blocks).index(block)
        x.register_hook(lambda grad: events.append(number))
        return run_block(block, x, *arguments)

    def hook(state, bucket):
        events.append("gradients")
        return (
            dist.all_reduce(bucket.buffer(), async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    model.run_block = watched
    parallel = distributed.wrap(model, torch.device("cpu"))
    parallel.register_comm_hook(None, hook)
    for _ in range(2):  # in its first step, DDP puts all gradients into one bucket
        events.clear()
        parallel(torch.randn(2, 3, 8, 8)).sum().backward()
    assert [event for event in events if event != "gradients"] == [2, 1, 0]
    assert events.index("gradients") < events.index(0)


def test_a_vote_is_known_one_call_later(group):
    vote = distributed.Vote()
    assert [vote.cast(flag) for flag in (False, True, False, False)] == [False, False, True, False]


def test_a_vote_of_one_process_is_known_at_once():
    vote = distributed.Vote()
    assert [vote.cast(flag) for flag in (False, True, False)] == [False, True, False]
