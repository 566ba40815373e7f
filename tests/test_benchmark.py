"""The benchmark on small grids: what it checks, what it computes from times, and what it writes."""

import itertools
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import attention
import benchmark
import masks
import models
import utils
from benchmarks import candidates, charts, errors, memory, timing, whole_models
from runtime import hardware

CPU = torch.device("cpu")
LIGHT = shlex.split(
    "--device cpu --grids '[3, 5]' --batch_size 2 --num_heads 2 --head_dim 8 "
    """--mask_types '["2d_cardinal", "1d_cardinal"]' --expansion_steps '[1]' --rounds 3"""
)


@pytest.fixture
def report(tmp_path):
    output = tmp_path / "report.json"
    arguments = [*LIGHT, "--backends", '["dense", "uncompiled", "flex"]', "--output", str(output)]
    assert benchmark.main(arguments) == 0
    return output


def test_a_small_run_from_end_to_end(report):
    found = utils.read_json(report)
    rows = found["rows"]
    assert [row["backend"] for row in rows] == ["full SDPA", *["dense", "uncompiled"] * 2] * 2
    assert found["left_out"] == {"flex": "runs on CUDA, not on cpu"}
    assert found["threads"] == torch.get_num_threads()
    assert found["provenance"]["versions"]["torch"] == torch.__version__
    for row in rows:
        assert row["num_patches"] == row["grid"] ** 2
        assert row["num_sequences"] == 4
        time = row["milliseconds"]
        assert time["q1"] <= time["median"] <= time["q3"]
        assert row["largest_error"] < 1e-5
        assert row["first_run_seconds"] > 0

    assert rows[0]["speedup"] == {"q1": 1, "median": 1, "q3": 1}
    plus = masks.build_attention_mask("2d_cardinal", 1, 3, 3)
    assert rows[1]["num_neighbors_mean"] == plus.sum().item() / 9
    assert rows[1]["ceiling"] == pytest.approx(81 / plus.sum().item())

    plots = {path.name for path in report.parent.iterdir()} - {report.name}
    kinds_and_suffixes = itertools.product(("time", "speedup", "memory"), ("png", "svg"))
    assert plots == {f"report_{kind}.{suffix}" for kind, suffix in kinds_and_suffixes}


def test_plots_are_redrawn_from_the_json(report, monkeypatch):
    (report.parent / "report_time.png").unlink()
    monkeypatch.setattr(benchmark, "measure", lambda *args: pytest.fail("measured"))
    assert benchmark.main(["--plot", str(report)]) == 0
    assert (report.parent / "report_time.png").stat().st_size > 5000

    (report.parent / "report_memory.png").unlink()
    monkeypatch.setattr(charts, "_speedup", lambda row: 1 / 0)
    with pytest.raises(utils.UserError, match=r"report_speedup \(division by zero\)"):
        benchmark.main(["--plot", str(report)])
    assert (report.parent / "report_memory.png").exists(), "one that fails does not stop the others"


@pytest.mark.parametrize("wrong", [(0, 3), (2, 3), (1, 3), (2, 1)])
def test_on_one_image_and_two_heads_an_error_is_found_there(wrong):
    """Image 2 of three, heads 0 and 3 of four: what a GPU compares of its larger batches."""
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 3)
    compiled = attention.compile_mask(mask, 1, "dense")
    qkv = torch.randn(3, 10, 3, 4, 8, requires_grad=True)
    image, head = wrong

    def attend(qkv, error=0.0):
        out = attention.attend_packed(qkv, compiled)
        where = torch.zeros_like(out)
        where[image, :, head] = error
        return out + where

    def error_of(function):
        return errors.largest_error(function, qkv, mask, 1, of_one_image=True)

    assert error_of(attend) < 1e-5
    found = error_of(lambda qkv: attend(qkv, 0.5))
    assert found == pytest.approx(0.5 if wrong == (2, 3) else 0, abs=1e-5)


def test_defaults_of_a_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "pick_device", lambda name: torch.device("cuda"))
    args = benchmark.parse_args([])
    assert (args.dtype, args.grids) == ("bf16", [14, 28, 64, 128])
    assert candidates.shape_of(args, 64, torch.device("cuda")) == (8, 12)
    args = benchmark.parse_args(["--dtype", "fp32", "--grids", "[7]", "--batch_size", "3"])
    assert (args.dtype, args.grids) == ("fp32", [7])
    assert candidates.shape_of(args, 7, torch.device("cuda")) == (3, 12)


def test_only_models_are_compiled(run_script):
    code, _, error = run_script(benchmark.main, "--device", "cpu", "--compile", "default")
    assert code == utils.EXIT_USAGE
    assert "--compile: for --level model, got --level attention" in error


def test_compiled_models_are_checked_and_timed(monkeypatch):
    compiled = []

    def compile(function, mode, dynamic):
        compiled.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    args = benchmark.parse_args([*LIGHT, "--level", "model", "--model", "vit_micro"])
    args.compile = "default"
    made = whole_models.model_candidates(args, 3, ["dense", "timm"], CPU)
    assert len(compiled) > len(made)  # the references, too
    assert all(c.check() < 1e-4 for c in made if c.check is not None)


def test_class_token_and_peers(tmp_path):
    args = benchmark.parse_args([*LIGHT, "--class_token"])
    made = candidates.attention_candidates(args, 3, ["dense", "uncompiled", "local-attention"], CPU)
    # local-attention is missing: it doesn't support global tokens.
    assert [c.backend for c in made] == ["full SDPA", *["dense", "uncompiled"] * 2]
    assert all(c.check() < 1e-5 for c in made)
    num_pairs = masks.build_attention_mask("2d_cardinal", 1, 3, 3).sum() + 19
    assert made[1].ceiling == pytest.approx(100 / num_pairs)


def test_separate_q_k_and_v_are_checked_and_timed():
    args = benchmark.parse_args([*LIGHT, "--class_token", "--separate"])
    backends = ["dense", "diagonal", "uncompiled"]
    made = candidates.attention_candidates(args, 3, backends, CPU)
    assert {c.backend for c in made} == {"full SDPA", "dense", "diagonal"}
    for candidate in made:
        assert candidate.check() < 1e-5
        gradients = candidate.run()
        assert [tuple(gradient.shape) for gradient in gradients] == 3 * [(2, 2, 10, 8)]


def test_models_compute_the_same_and_have_a_ceiling():
    args = benchmark.parse_args([*LIGHT, "--level", "model", "--model", "vit_micro"])
    made = whole_models.model_candidates(args, 3, ["dense", "timm"], CPU)
    assert [c.backend for c in made] == ["full SDPA", "no attention", "timm", "dense", "dense"]
    assert all(c.check() < 1e-4 for c in made[2:])
    assert made[2].ceiling == 1
    assert made[1].ceiling > made[3].ceiling > 1


@pytest.mark.parametrize("level", ["attention", "model"])
def test_auto_is_measured_as_it_chooses(level, monkeypatch):
    choice = attention.Choice("diagonal", "chosen")
    monkeypatch.setattr(attention, "choose_backend", lambda *args, **kwargs: choice)
    monkeypatch.setattr(candidates.diagonal, "can_compile", lambda device_type: False)
    args = benchmark.parse_args([*LIGHT, "--level", level, "--model", "vit_micro"])
    build = {
        "attention": candidates.attention_candidates,
        "model": whole_models.model_candidates,
    }[level]
    made = build(args, 3, ["auto"], CPU)
    assert [c.backend for c in made if c.mask.mask_type != "full"] == ["auto"] * 2
    assert made[-1].check() < 1e-4


def test_a_model_with_another_mask_is_seen():
    """Absolute differences of loss and gradients are below the tolerance; relative ones aren't."""

    def build(step):
        torch.manual_seed(0)
        mask = masks.build_attention_mask("2d_all_neighbors", step, 14, 14)
        options = {"dropout": 0.0, "attention_mask": mask, **models.PRESETS["vit_micro"]}
        return models.VisionTransformer(56, 4, **options)

    def step(model):
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), torch.arange(2))
        loss.backward()
        return loss.detach()

    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert whole_models.model_error(step, build(1), build(1)) == 0
    assert whole_models.model_error(step, build(1), build(2)) > 0.1


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 12545])
def test_checked_rows_contain_both_ends_and_consecutive_rows(num_tokens):
    rows = errors.checked_rows(num_tokens).tolist()
    assert rows == sorted(set(rows))
    assert (rows[0], rows[-1]) == (0, num_tokens - 1)
    assert len(rows) <= errors.NUM_CHECKED_ROWS
    if num_tokens > errors.NUM_CHECKED_ROWS:
        num_consecutive = sum(b - a == 1 for a, b in itertools.pairwise(rows))
        assert num_consecutive >= errors.NUM_CHECKED_ROWS // 2 - 1


def test_an_interrupt_keeps_the_grids_that_are_done(tmp_path, monkeypatch):
    measure_grid = benchmark.measure_grid

    def interrupted(args, grid, backends, device):
        if grid == 5:
            raise KeyboardInterrupt
        return measure_grid(args, grid, backends, device)

    monkeypatch.setattr(benchmark, "measure_grid", interrupted)
    output = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*LIGHT, "--backends", '["dense"]', "--output", str(output)])
    assert {row["grid"] for row in utils.read_json(output)["rows"]} == {3}


def test_a_wrong_candidate_is_refused():
    args = benchmark.parse_args(LIGHT)
    made = candidates.attention_candidates(args, 3, ["dense"], CPU)
    benchmark.prepare(made, 1e-4, CPU)

    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 3)
    wrong = masks.build_attention_mask("2d_all_neighbors", 1, 3, 3)
    attend = attend_with(attention.compile_mask(wrong, 0, "dense"))
    qkv = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    made[1].check = lambda: errors.largest_error(attend, qkv, mask, 0)
    with pytest.raises(utils.UserError, match="2d_cardinal, step 1: dense is off by"):
        benchmark.prepare(made, 1e-4, CPU)

    made[1].check = lambda: float("nan")
    with pytest.raises(utils.UserError, match="off by nan"):
        benchmark.prepare(made, 1e-4, CPU)


def attend_with(compiled, before=lambda qkv: qkv):
    return lambda qkv: attention.attend_packed(before(qkv), compiled)


def gradient_times(factor):
    """The identity, but its gradient is multiplied by the factor."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * factor

    return Wrong


def test_a_wrong_gradient_is_seen():
    """Right outputs with wrong gradients, as a miscompiled backward pass would give them."""
    compiled = attention.compile_mask(None)
    qkv = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    right = attend_with(compiled)
    wrong = attend_with(compiled, before=gradient_times(1.01).apply)
    assert errors.largest_error(right, qkv, None, 0) < 1e-5
    assert errors.largest_error(wrong, qkv, None, 0) > 1e-4


def test_a_gradient_of_nan_is_seen():
    """Right outputs with gradients of NaN, as cuDNN's backward has given them for some masks."""
    compiled = attention.compile_mask(None)
    qkv = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    wrong = attend_with(compiled, before=gradient_times(float("nan")).apply)
    assert np.isnan(errors.largest_error(wrong, qkv, None, 0))


def test_quartiles():
    values = benchmark.quartiles(np.array([5.0, 1.0, 3.0, 2.0, 4.0]))
    assert values == {"q1": 2.0, "median": 3.0, "q3": 4.0}


def test_fitted_exponent():
    patches = [196, 784, 3136]
    assert charts.fit_exponent(patches, [3 * n**1.7 for n in patches]) == pytest.approx(1.7)


NOT_LINUX = hardware.platform.libc_ver()[0] != "glibc"


@pytest.mark.skipif(NOT_LINUX, reason="peak memory on the CPU is only read on Linux")
def test_peak_memory_is_that_of_the_call():
    size = 64 * 2**20
    peak = memory.peak_memory_of(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert 0.99 * size <= peak < 1.5 * size  # Linux counts resident pages roughly


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--rounds", "2"], 2, "at least 3"),
        (["--backends", '["magic"]'], 2, "unknown 'magic'"),
        (["--grids", "14"], 2, "JSON list"),
        (["--grids", "[0]"], 2, "at least 1 patch"),
        (["--grids", "[1000]"], 2, "at most 256 patches per side"),
        (["--plot", "nowhere.json"], 1, "nowhere.json"),
    ],
)
def test_bad_command_lines_end_in_one_line(arguments, code, words, run_script):
    found, _, err = run_script(benchmark.main, *arguments)
    assert found == code
    assert len(err.splitlines()) == 1
    assert words in err


def test_quick_leaves_what_is_asked_for():
    quick = benchmark.parse_args(["--quick", "--device", "cpu"])
    assert (quick.mask_types, quick.grids, quick.rounds) == (["2d_all_neighbors"], [14, 28], 7)

    flags = ["--mask_types", '["random"]', "--grids", "[5]", "--rounds", "3", "--device", "cpu"]
    asked = benchmark.parse_args(["--quick", *flags])
    assert (asked.mask_types, asked.grids, asked.rounds) == (["random"], [5], 3)
    assert asked.expansion_steps == [1]


# --------------------------------------------------------------------------------------------------
# How a call is timed


@pytest.fixture
def seconds_on_cuda(monkeypatch):
    """Pretend that calls take 1 ms on a GPU; returns what was timed, as (function, number)."""
    timed = []

    def seconds_per_call(function, device, num_calls):
        timed.append((function, num_calls))
        return 1e-3

    monkeypatch.setattr(timing.hardware, "seconds_per_call", seconds_per_call)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return timed


def test_on_a_cpu_one_call_is_timed():
    calls = []
    timer = timing.timers_of({"a": lambda: calls.append(1)}, CPU)["a"]
    assert timer() > 0
    assert len(calls) == 1
    assert not timer.replays_graph


def test_on_cuda_a_graph_is_replayed_for_long_enough(seconds_on_cuda, monkeypatch):
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(timing, "record_graph", lambda function: graph)
    timer = timing.timers_of({"a": lambda: None}, torch.device("cuda"))["a"]
    assert timer() == 1e-3
    assert seconds_on_cuda[-1] == (graph.replay, 10)  # of 1 ms: 10 ms
    assert timer.replays_graph


def test_all_are_called_if_one_cannot_be_recorded(seconds_on_cuda, monkeypatch, capsys):
    def record(function):
        if function is second:
            raise RuntimeError("operation not permitted when stream is capturing")
        return SimpleNamespace(replay=lambda: None)

    def first():
        pass

    def second():
        pass

    monkeypatch.setattr(timing, "record_graph", record)
    timers = timing.timers_of({"1st": first, "2nd": second}, torch.device("cuda"))
    assert not any(timer.replays_graph for timer in timers.values())
    assert [timer.run for timer in timers.values()] == [first, second]
    assert "as 2nd makes no CUDA graph: operation not permitted" in capsys.readouterr().err


def test_graphs_that_do_not_fit_are_an_error(seconds_on_cuda, monkeypatch):
    def record(function):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "record_graph", record)
    with pytest.raises(torch.OutOfMemoryError):
        timing.timers_of({"a": lambda: None}, torch.device("cuda"))


def test_rows_of_cuda_have_the_time_of_a_call_too(seconds_on_cuda, monkeypatch):
    cuda = torch.device("cuda")
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(timing, "record_graph", lambda function: graph)
    monkeypatch.setattr(hardware, "seconds_of", lambda function, device: 5e-3)
    monkeypatch.setattr(benchmark, "peak_memory_of", lambda function, device: 0)
    full = candidates.Candidate("full SDPA", masks.MaskSpec(), 9, 1, 1.0, lambda: None, None)
    (row,) = benchmark.measure_candidates([full], benchmark.parse_args(LIGHT), 3, cuda)
    assert row["milliseconds"]["median"] == pytest.approx(1)
    assert row["call_milliseconds"]["median"] == pytest.approx(5)
    assert row["replays_graph"]
    report = {"level": "attention", "rows": [row]}
    assert charts.drawings(report)["time"].args[1].startswith("GPU time of attention")


@pytest.mark.cuda
def test_a_replayed_graph_computes_what_the_call_computes():
    x = torch.arange(4.0, device="cuda")
    out = torch.zeros_like(x)
    graph = timing.record_graph(lambda: out.copy_(x * x))
    x.fill_(3)
    graph.replay()
    assert out.tolist() == [9, 9, 9, 9]
