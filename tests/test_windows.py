"""1D windows through torch's varlen_attn, as far as no GPU is needed."""

import pytest
import torch
from test_attention import oracle, random_qkv
from torch._subclasses.fake_tensor import FakeTensorMode

import attention
import masks
from attention import Choice, attend_packed, choice, compile_mask, tiled, windows


@pytest.mark.parametrize(("left", "right"), [(0, 0), (2, 2), (3, 0), (0, 4), (9, 1), (11, 11)])
def test_windows_are_recognized(left, right):
    i = torch.arange(12)
    offset = i[None] - i[:, None]
    mask = (offset >= -left) & (offset <= right)
    assert windows.find_window(mask) == (left, right)


def test_other_masks_are_no_windows():
    assert windows.find_window(masks.build_attention_mask("2d_cardinal", 1, 3, 4)) is None
    mask = masks.build_attention_mask("1d_cardinal", 1, 3, 4)
    mask[5, 5] = False
    assert windows.find_window(mask) is None


def test_anything_else_falls_back_to_dense_with_a_reason():
    window = masks.build_attention_mask("1d_cardinal", 1, 3, 4)
    square = masks.build_attention_mask("2d_all_neighbors", 1, 3, 4)
    for mask, num_global in ((window, 1), (square, 0)):
        compiled = compile_mask(mask, num_global, "varlen")
        assert compiled.backend == "dense"
        assert "no 1D window without global tokens" in compiled.choice.reason
        with pytest.raises(ValueError, match="no 1D window"):
            compiled.apply_choice(Choice("varlen", ""))
    with pytest.raises(ValueError, match="'varlen' runs on CUDA, not on cpu"):
        attend_packed(random_qkv(12), compile_mask(window, 0, "varlen"))


@pytest.fixture
def pretended(monkeypatch):
    """varlen_attn, spelled out: q, k, v are [B * T, H, D], of sequences that end at `ends`."""

    def varlen_attn(q, k, v, ends, ends_k, longest, longest_k, *, window_size):
        assert torch.equal(ends, ends_k)
        assert longest == longest_k == int(ends.diff().max())
        outs = []
        for start, end in ends.unfold(0, 2, 1).tolist():
            qkv = torch.stack([q[start:end], k[start:end], v[start:end]], dim=1)[None]
            i = torch.arange(end - start)
            offset = i[None] - i[:, None]
            window = (offset >= -window_size[0]) & (offset <= window_size[1])
            outs.append(oracle(qkv, window)[0].to(q.dtype))
        return torch.cat(outs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(windows, "is_available", lambda: True)
    monkeypatch.setattr(windows, "DEVICES", ("cpu",))


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 16), (torch.float32, 16)])
def test_a_batch_is_passed_as_sequences(pretended, dtype, head_dim):
    """And what flash attention does not take, such as fp32, is computed otherwise."""
    mask = masks.build_attention_mask("1d_cardinal", 2, 4, 5)
    compiled = compile_mask(mask, 0, "varlen")
    qkv = random_qkv(20, batch=3, head_dim=head_dim, dtype=dtype)
    out = attend_packed(qkv, compiled)
    torch.testing.assert_close(out.double(), oracle(qkv, mask), rtol=0.02, atol=0.01)
    (grad,) = torch.autograd.grad(out.double().square().sum(), qkv)
    (exact,) = torch.autograd.grad(oracle(qkv, mask).square().sum(), qkv)
    torch.testing.assert_close(grad, exact, rtol=0.05, atol=0.05)


def test_it_is_one_more_candidate_on_cuda(monkeypatch):
    monkeypatch.setattr(windows, "is_available", lambda: True)
    cuda = torch.device("cuda")
    candidates = {
        (mask_type, num_global): choice.find_candidates(
            compile_mask(masks.build_attention_mask(mask_type, 1, 4, 5), num_global, "measure"),
            cuda,
            torch.bfloat16,
            64,
        )
        for mask_type, num_global in (("1d_cardinal", 0), ("1d_cardinal", 1), ("2d_cardinal", 0))
    }
    assert [case for case, found in candidates.items() if "varlen" in found] == [("1d_cardinal", 0)]
    assert all({"flex", "diagonal"} <= set(found) for found in candidates.values())


@pytest.mark.parametrize(
    ("dtype", "head_dim", "missing"),
    [
        (torch.bfloat16, 64, set()),
        (torch.float32, 64, {"varlen"}),
        (torch.bfloat16, 20, {"varlen"}),
        (torch.bfloat16, 192, {"tiled"}),
        (torch.float64, 64, {"tiled", "varlen"}),
    ],
)
def test_a_backend_that_does_not_take_the_tensors_is_no_candidate(
    monkeypatch, dtype, head_dim, missing
):
    """It would be timed under its name, and something else would run."""
    monkeypatch.setattr(windows, "is_available", lambda: True)
    monkeypatch.setattr(tiled, "error", lambda device_type: None)
    compiled = compile_mask(masks.build_attention_mask("1d_cardinal", 1, 4, 5), 0, "measure")
    found = choice.find_candidates(compiled, torch.device("cuda"), dtype, head_dim)
    assert {"tiled", "varlen"} - set(found) == missing


def test_without_it_the_backend_says_so(monkeypatch):
    monkeypatch.setattr(windows, "is_available", lambda: False)
    assert "needs varlen_attn with windows" in attention.unusable("varlen", "cuda")


@pytest.mark.skipif(not windows.is_available(), reason="this torch has no varlen_attn with windows")
def test_torchs_own_takes_these_arguments():
    """Its fake version, which checks the call; the real one needs a GPU."""
    with FakeTensorMode() as mode:
        qkv = mode.from_tensor(torch.empty(2, 20, 3, 4, 16, dtype=torch.bfloat16))
        assert windows.attend(qkv, (2, 2)).shape == (2, 20, 4, 16)
