"""The native kernel against attention spelled out in float64, and how it is built."""

import multiprocessing
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import oracle, random_qkv, train_digits
from torch._subclasses.fake_tensor import FakeTensorMode

import masks
import utils
from attention import attend, attend_packed, build, choose_backend, compile_mask, native, rule
from attention.neighbors import find_neighbors

pytestmark = pytest.mark.skipif(build.error() is not None, reason=str(build.error()))

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}  # of the largest value


def error_of(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def assert_matches_oracle(mask, num_global=0, dtype=torch.float32, batch=2, heads=3, head_dim=8):
    compiled = compile_mask(mask, num_global, "native")
    num_tokens = len(mask) + num_global
    qkv = random_qkv(num_tokens, batch, heads, head_dim, dtype)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(qkv[:, :, 0].shape, generator=generator).to(dtype)

    out = attend_packed(qkv, compiled)
    (grad_qkv,) = torch.autograd.grad(out, qkv, grad)
    exact = oracle(qkv, mask, num_global)
    (exact_grad,) = torch.autograd.grad(exact, qkv, grad.double())

    assert out.dtype == grad_qkv.dtype == dtype
    assert error_of(out, exact) < TOLERANCE[dtype]
    assert error_of(grad_qkv, exact_grad.double()) < TOLERANCE[dtype]


# --------------------------------------------------------------------------------------------------
# Neighbor lists


@given(st.integers(1, 12), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_lists_hold_exactly_the_pairs_of_the_mask(num_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_tokens, num_tokens, generator=generator) < 0.3
    mask |= torch.eye(num_tokens, dtype=torch.bool)[torch.randperm(num_tokens, generator=generator)]
    lists = find_neighbors(mask)

    by_query, by_key = torch.zeros_like(mask), torch.zeros_like(mask)
    for i in range(num_tokens):
        edges = range(lists.start[i], lists.start[i + 1])
        assert all(lists.query[e] == i for e in edges)
        by_query[i, lists.key[edges.start : edges.stop]] = True
        for e in range(lists.key_start[i], lists.key_start[i + 1]):
            by_key[lists.key_query[e], i] = True
            number = lists.key_edge[e]
            assert (lists.query[number], lists.key[number]) == (lists.key_query[e], i)
    assert torch.equal(by_query, mask)
    assert torch.equal(by_key, mask)


def test_the_order_of_keys_follows_their_last_queries():
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 4)
    lists = find_neighbors(mask)
    tokens = torch.arange(12)
    last = torch.stack([tokens[mask[:, j]].max() for j in range(12)])
    assert torch.equal(last[lists.by_last_query.long()], lists.last_query.long())
    assert lists.last_query.diff().min() >= 0
    furthest = torch.stack([tokens[mask[: i + 1].any(0)].max() for i in range(12)])
    assert torch.equal(lists.needed.long(), furthest + 1)


# --------------------------------------------------------------------------------------------------
# Against the oracle


@pytest.mark.parametrize("num_global", [0, 1, 3])
@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (4, 3), (3, 5)])
@pytest.mark.parametrize("mask_type", masks.MASK_TYPES[1:])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_patterns_match_the_oracle(dtype, mask_type, grid, num_global):
    for step in (0, 1, 2, 7):
        mask = masks.build_attention_mask(mask_type, step, *grid)
        assert_matches_oracle(mask, num_global, dtype)


@pytest.mark.parametrize("head_dim", [1, 5, 16, 17, 32, 40, 64, 96, 128, 200, 256])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_head_dim(dtype, head_dim):
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 5, 4)
    assert_matches_oracle(mask, 1, dtype, batch=1, heads=2, head_dim=head_dim)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 5), (9, 2)])
def test_any_batch_on_any_number_of_threads(num_threads, batch, heads):
    """Few images and heads are split by tokens as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        mask = masks.build_attention_mask("2d_all_neighbors", 2, 6, 7)
        assert_matches_oracle(mask, 1, batch=batch, heads=heads)
        assert_matches_oracle(mask, 0, torch.bfloat16, batch=batch, heads=heads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("expansion_step", [1, 2])
def test_results_that_are_written_past_the_caches(expansion_step):
    """2**20 numbers and more; with few and with many neighbors."""
    mask = masks.build_attention_mask("2d_cardinal", expansion_step, 16, 17)
    for dtype in TOLERANCE:
        assert_matches_oracle(mask, 1, dtype, batch=8, heads=8, head_dim=64)


def test_lists_longer_than_what_is_computed_at_once():
    assert_matches_oracle(masks.build_attention_mask("1d_all_neighbors", 3, 65, 65), 1, batch=1)


@given(st.integers(1, 40), st.integers(0, 3), st.floats(0, 1), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_mask_matches_the_oracle(num_tokens, num_global, density, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_tokens, num_tokens, generator=generator) < density
    mask |= torch.eye(num_tokens, dtype=torch.bool)[torch.randperm(num_tokens, generator=generator)]
    assert_matches_oracle(mask, num_global, batch=1, heads=2, head_dim=7)


def test_separate_and_strided_inputs():
    mask = masks.build_attention_mask("2d_cardinal", 2, 4, 5)
    compiled = compile_mask(mask, 1, "native")
    qkv = random_qkv(21, dtype=torch.float32)
    packed = attend_packed(qkv, compiled)
    (expected,) = torch.autograd.grad(packed.square().sum(), qkv)

    q, k, v = qkv.detach().permute(2, 0, 3, 1, 4)  # [B, H, T, D], views with strides
    reversed_dims = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    inputs = [x.requires_grad_() for x in (q.contiguous(), reversed_dims, v)]
    out = attend(*inputs, compiled)
    gradients = torch.autograd.grad(out.square().sum(), inputs)

    assert torch.equal(out.transpose(1, 2), packed)
    for gradient, wanted in zip(gradients, expected.permute(2, 0, 3, 1, 4), strict=True):
        assert torch.equal(gradient, wanted)

    every_other = torch.randn(2, 42, 3, 2, 8)[:, ::2]
    assert torch.equal(
        attend_packed(every_other, compiled), attend_packed(every_other.contiguous(), compiled)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_computed_as_well(dtype):
    mask = masks.build_attention_mask("2d_cardinal", 1, 4, 5)
    qkv = random_qkv(20, dtype=dtype)
    out = attend_packed(qkv, compile_mask(mask, backend="native"))
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    exact = oracle(qkv, mask)
    (exact_grad,) = torch.autograd.grad(exact.sum(), qkv)
    assert out.dtype == grad.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-3
    assert error_of(out, exact) < tolerance
    assert (grad - exact_grad).abs().max() < 10 * tolerance


def test_autocast_computes_in_bf16():
    mask = masks.build_attention_mask("2d_cardinal", 1, 4, 5)
    compiled = compile_mask(mask, backend="native")
    qkv = random_qkv(20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend_packed(qkv, compiled)
    assert torch.equal(out, attend_packed(qkv.bfloat16(), compiled))


# --------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_stays_in_its_rows(which, value):
    mask = masks.build_attention_mask("2d_cardinal", 1, 4, 5)
    qkv = random_qkv(20, dtype=torch.float32).detach()
    qkv[0, 7, which, 1, 3] = value
    out = attend_packed(qkv, compile_mask(mask, backend="native"))
    concerned = mask[:, 7] if which else torch.arange(20) == 7
    assert out[0, ~concerned].isfinite().all()
    assert out[1].isfinite().all()
    assert not out[0, concerned, 1].isfinite().all()
    # Elsewhere the oracle multiplies the value by a weight of zero.
    exact = oracle(qkv, mask)
    assert torch.equal(out[0, concerned].isnan(), exact[0, concerned].isnan())


def test_large_scores_do_not_overflow():
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 4, 5)
    qkv = random_qkv(20, dtype=torch.float32).detach()
    qkv[:, :, :2] *= 1e4
    out = attend_packed(qkv, compile_mask(mask, backend="native"))
    assert out.isfinite().all()
    assert error_of(out, oracle(qkv, mask)) < 1e-3


def test_results_are_the_same_bit_for_bit():
    mask = masks.build_attention_mask("2d_all_neighbors", 2, 9, 8)
    compiled = compile_mask(mask, 1, "native")
    qkv = random_qkv(73, batch=3, heads=3, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 2, 5):
            torch.set_num_threads(num_threads)
            out = attend_packed(qkv, compiled)
            (grad,) = torch.autograd.grad(out.square().sum(), qkv)
            results.append((out, grad))
    finally:
        torch.set_num_threads(before)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


# --------------------------------------------------------------------------------------------------
# In PyTorch


def test_the_operators_keep_their_contracts():
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 4)
    lists = find_neighbors(mask).flat
    qkv = random_qkv(12, dtype=torch.float32)
    torch.library.opcheck(native._packed_operator, (qkv, lists, True))
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(2))
    torch.library.opcheck(native._operator, (q, k, v, lists, True))


def test_torch_compile_gives_the_same():
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 4)
    compiled = compile_mask(mask, backend="native")
    qkv = random_qkv(12, dtype=torch.float32)

    def step(x):
        return attend_packed(x * 1.5, compiled).square().sum()

    (expected,) = torch.autograd.grad(step(qkv), qkv)
    (found,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(qkv), qkv)
    torch.testing.assert_close(found, expected)


def test_fake_tensors_take_the_operator():
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 4)
    compiled = compile_mask(mask, backend="native")
    qkv = random_qkv(12, dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = attend_packed(mode.from_tensor(qkv), compiled)
    assert out.shape == (qkv.shape[0], 12, *qkv.shape[3:])


def test_nothing_is_kept_without_gradients():
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 4)
    lists = find_neighbors(mask).flat
    _, p = native._packed_operator(random_qkv(12, dtype=torch.float32), lists, False)
    assert p.numel() == 0


RUNTIMES = """
import re, sys
import sklearn.ensemble  # which brings a runtime of its own
import torch
sys.path.insert(0, "tests")
from attention import build
import test_native
test_native.attend_once()
lines = open("/proc/self/maps").read().splitlines()
loaded = {line.split()[-1] for line in lines if re.search(r"lib(gomp|iomp5|omp)\\b", line)}
assert str(build._openmp_runtime()) in loaded
print("\\n".join(path for path in loaded if "scikit_learn" not in path))
"""


def test_the_kernel_shares_the_openmp_runtime_of_torch():
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("there is no /proc here")
    command = [sys.executable, "-c", RUNTIMES]
    done = subprocess.run(command, cwd=utils.REPOSITORY, capture_output=True, text=True)
    (runtime,) = done.stdout.split() or [done.stderr]
    assert "torch" in runtime


def attend_once(queue=None):
    mask = masks.build_attention_mask("2d_all_neighbors", 1, 6, 6)
    out = attend_packed(random_qkv(36, dtype=torch.float32), compile_mask(mask, backend="native"))
    if queue is not None:
        queue.put(out.detach().sum().item())
    return out.detach().sum().item()


def test_a_forked_process_does_not_hang():
    expected = attend_once()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=attend_once, args=(queue,))
    process.start()
    try:
        assert queue.get(timeout=60) == pytest.approx(expected)
    finally:
        process.kill()


def test_threads_may_call_it_at_once():
    expected, found = attend_once(), []
    threads = [threading.Thread(target=lambda: found.append(attend_once())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


# --------------------------------------------------------------------------------------------------
# Building

ATTEND = """
import torch
import masks
from attention import attend_packed, compile_mask
compiled = compile_mask(masks.build_attention_mask("2d_all_neighbors", 1, 6, 6), backend="native")
torch.manual_seed(0)
print(attend_packed(torch.randn(2, 36, 3, 2, 8), compiled).sum().item())
"""


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """One that barely optimizes, to be quick, and writes down what it has compiled."""
    path = tmp_path_factory.mktemp("bin") / "c++"
    path.write_text(f'#!/bin/sh\n{build.find_compiler()} "$@" -O1 && echo "$@" >> {path}.calls\n')
    path.chmod(0o755)
    return path


def start(cache, compiler, program=ATTEND, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=utils.REPOSITORY,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "CXX": str(compiler), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def libraries(cache):
    return list(cache.glob("local-attention-vits/native-*.so"))


def num_builds(compiler):
    return Path(f"{compiler}.calls").read_text().count(" -c ")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, compiler):
    """A cache folder with a library, built by processes that started together."""
    folder = tmp_path_factory.mktemp("cache")
    started = [start(folder, compiler) for _ in range(4)]
    outputs = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0] * 4
    assert len(outputs) == 1
    assert num_builds(compiler) == 1
    return folder


def test_processes_that_start_together_build_once(cache):
    assert len(libraries(cache)) == 1


def test_a_damaged_library_is_built_again(cache, compiler):
    (library,) = libraries(cache)
    whole = library.read_bytes()
    library.write_bytes(whole[:5000])  # loading it would crash
    process = start(cache, compiler)
    process.communicate()
    assert process.returncode == 0
    assert library.stat().st_size > 5000


ORACLES = """
import ctypes, sys
sys.path.insert(0, "tests")
from attention import build
build.load = lambda: ctypes.CDLL(sys.argv[1])
import test_native as t
for num_global in (0, 1, 3):
    for grid in ((1, 1), (1, 6), (4, 3), (3, 5)):
        for mask_type in t.masks.MASK_TYPES[1:]:
            for step in (0, 1, 7):
                mask = t.masks.build_attention_mask(mask_type, step, *grid)
                for dtype in t.TOLERANCE:
                    t.assert_matches_oracle(mask, num_global, dtype)
for head_dim in (1, 5, 16, 17, 32, 40, 64, 96, 256):
    for dtype in t.TOLERANCE:
        for batch in (1, 9):
            t.assert_matches_oracle(mask, 1, dtype, batch=batch, head_dim=head_dim)
t.test_lists_longer_than_what_is_computed_at_once()
t.test_results_that_are_written_past_the_caches(1)
print("clean")
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64's vectors")
@pytest.mark.parametrize("machine", ["x86-64", "x86-64-v3"])
def test_kernels_for_narrower_vectors(machine, tmp_path):
    """SSE and AVX2, which every machine with AVX-512 has."""
    library = tmp_path / "narrow.so"
    flags = [*build.FLAGS, f"-march={machine}", "-fopenmp", "-shared"]
    compiler = build.find_compiler()
    subprocess.run([compiler, *flags, str(build.SOURCE), "-o", str(library)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", ORACLES, str(library)],
        cwd=utils.REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "clean\n", done.stderr[-3000:]


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("backend", ["dense", "diagonal", "native"])
def test_second_derivatives_are_refused_and_never_wrong(backend, is_packed):
    """As of a gradient penalty: a backward that has no derivative must say so."""
    compiled = compile_mask(masks.build_attention_mask("2d_cardinal", 1, 3, 4), 1, backend)
    qkv = random_qkv(13, dtype=torch.float32)
    if is_packed:
        out = attend_packed(qkv, compiled)  # [B, T, H, D]
    else:
        out = attend(*qkv.permute(2, 0, 3, 1, 4), compiled)  # [B, H, T, D]

    loss = out.square().sum() + qkv.square().sum()
    (grad,) = torch.autograd.grad(loss, qkv, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


def test_sanitizers_find_nothing(tmp_path):
    """AddressSanitizer and UndefinedBehaviorSanitizer, with the oracle."""
    library, compiler = tmp_path / "sanitized.so", build.find_compiler()
    runtimes = []
    for name in ("libasan.so", "libstdc++.so"):  # of the latter, asan takes what throws exceptions
        command = [compiler, f"-print-file-name={name}"]
        runtimes.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip(f"{compiler} has no libasan")

    flags = ["-std=c++17", "-O1", "-g", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    command = [compiler, *flags, *sanitizers, str(build.SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    done = subprocess.run(
        [sys.executable, "-c", ORACLES, str(library)],
        cwd=utils.REPOSITORY,
        env={**os.environ, "LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "clean\n", done.stderr[-3000:]


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(tmp_path, compiler):
    file = tmp_path / "file"
    file.write_text("not a folder")
    process = start(file, compiler, TMPDIR=str(tmp_path))
    process.communicate()
    assert process.returncode == 0
    assert len(libraries(tmp_path / f"cache-{os.getuid()}")) == 1


CHOICE = (
    "import masks; from attention import compile_mask, attend_packed; import torch; "
    "compiled = compile_mask(masks.build_attention_mask('2d_cardinal', 1, 28, 28)); "
    "attend_packed(torch.randn(1, 784, 3, 1, 8), compiled); print(compiled.backend)"
)


@pytest.mark.parametrize("broken", ["/nowhere/c++", "/bin/false"])
def test_without_a_compiler_another_backend_runs_after_one_warning(tmp_path, broken):
    process = start(tmp_path, broken, CHOICE)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.strip() == "diagonal"
    assert err.count("the native attention kernel cannot be used") == 1


def test_asked_for_without_a_compiler_it_is_an_error(monkeypatch):
    monkeypatch.setattr(build, "error", lambda: "no C++ compiler found")
    mask = masks.build_attention_mask("2d_cardinal", 1, 3, 4)
    with pytest.raises(ValueError, match="'native' cannot be used: no C\\+\\+ compiler found; use"):
        compile_mask(mask, backend="native")


# --------------------------------------------------------------------------------------------------
# The choice


def test_auto_is_settled_by_the_first_call():
    mask = masks.build_attention_mask("2d_cardinal", 1, 14, 14)
    compiled = compile_mask(mask)
    attend_packed(random_qkv(196, dtype=torch.float32), compiled)
    assert compiled.backend == "native"
    assert compiled.choice.reason == "by rule: 924 of 38,416 pairs are allowed"


def test_a_mask_that_allows_much_stays_dense():
    assert rule.choose(784, 9 * 784**2 // 10, 0).backend == "dense"
    assert rule.choose(784, 9 * 784, 0).backend == "native"
    assert rule.choose(49, 49**2, 0).backend == "native"


@pytest.mark.parametrize("options", [(), ("--checkpoint_activations",)])
def test_training_gives_the_losses_of_dense_attention(tmp_path, options):
    losses = []
    for backend in ("dense", "native"):
        folder = train_digits(tmp_path / backend, "--backend", backend, *options)
        assert utils.read_json(folder / "config.json")["attention"]["backend"] == backend
        losses.append([row["eval_loss"] for row in utils.read_json_lines(folder / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_that_began_with_compiled_diagonals_goes_on_with_the_kernel(tmp_path, capsys):
    folder = train_digits(tmp_path)
    (folder / "summary.json").unlink()
    config = utils.read_json(folder / "config.json")
    config["attention"] |= {"backend": "diagonal", "backend_reason": "the fastest measured: ..."}
    utils.write_json(folder / "config.json", config)

    train_digits(tmp_path)
    found = utils.read_json(folder / "config.json")["attention"]
    assert (found["backend"], found["backend_reason"][:7]) == ("native", "by rule")
    assert "attention goes on with backend native" in capsys.readouterr().out


def test_many_diagonals_are_no_limit():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(300, 300, generator=generator) < 0.05
    mask |= torch.eye(300, dtype=torch.bool)
    compiled = compile_mask(mask)
    assert not compiled.offsets
    choice = choose_backend(compiled, 1, 2, 8, torch.float32, torch.device("cpu"), num_calls=1)
    assert choice.backend == "native"


def test_a_dense_mask_and_the_native_kernel_agree_in_a_model():
    from models import VisionTransformer

    mask = masks.build_attention_mask("2d_all_neighbors", 1, 4, 4)
    losses = {}
    for backend in ("dense", "native"):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2,
            attention_mask=mask, backend=backend,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[backend] = []
        for _ in range(5):
            loss = F.cross_entropy(model(torch.ones(4, 3, 16, 16)), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert losses["native"] == pytest.approx(losses["dense"], rel=1e-4)
