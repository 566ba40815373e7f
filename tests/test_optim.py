"""Weight decay, which weights Muon takes, the schedule, and the moving average of the weights."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from models import VisionTransformer
from training import muon, optimizers
from training.settings import Settings

SMALL = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
SETTINGS = Settings.from_dict({"lr": 1.0, "weight_decay": 0.1}).optimization
MUON = replace(SETTINGS, optimizer="muon")


def named_groups(model, optimizer):
    """One pair per parameter group: the names of its parameters, and its weight decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        ({names[parameter] for parameter in group["params"]}, group["weight_decay"])
        for group in optimizer.param_groups
    ]


def test_only_matrices_have_weight_decay():
    model = VisionTransformer(**SMALL)
    (optimizer,) = optimizers.build_optimizers(model, SETTINGS)
    (decayed, decay), (others, other_decay) = named_groups(model, optimizer)
    assert decay == 0.1
    assert other_decay == 0.0

    assert {"patch_embed.proj.weight", "blocks.1.mlp.fc2.weight", "head.weight"} <= decayed
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= others
    assert "blocks.0.attn.qkv.bias" in others
    assert decayed | others == {name for name, _ in model.named_parameters()}
    assert not any(name.endswith("bias") or "norm" in name for name in decayed)


def test_muon_takes_the_matrices_of_the_blocks():
    model = VisionTransformer(**SMALL)
    adamw, muon = optimizers.build_optimizers(model, MUON)
    ((by_muon, decay),) = named_groups(model, muon)
    assert decay == 0.1

    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert by_muon == {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers}

    # Muon must see them in the model's order, so that it is the same in every process.
    in_order = [parameter for name, parameter in model.named_parameters() if name in by_muon]
    assert all(a is b for a, b in zip(muon.param_groups[0]["params"], in_order, strict=True))

    by_adamw = set.union(*(names for names, _ in named_groups(model, adamw)))
    assert by_adamw | by_muon == {name for name, _ in model.named_parameters()}
    assert not by_adamw & by_muon


def test_muon_is_torchs_up_to_rounding_and_reads_its_state():
    """Tall, wide and square matrices, of which some share a shape."""
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 8), (32, 8), (8, 32), (8, 8), (24, 8)]
    theirs = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    ours = [torch.nn.Parameter(parameter.detach().clone()) for parameter in theirs]
    options = {"lr": 0.1, "weight_decay": 0.1}
    expected = torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw")
    found = muon.Muon(ours, **options)

    for step in range(6):
        if step == 3:  # as a run that began with torch's and resumes
            found = muon.Muon(ours, **options)
            found.load_state_dict(copy.deepcopy(expected.state_dict()))
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        expected.step()
        found.step()

    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=4e-3)  # bf16 of updates of 0.02
    theirs, ours = expected.state_dict(), found.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"])


def test_muon_takes_all_matrices_of_a_shape_together():
    model = VisionTransformer(**SMALL | {"depth": 6})
    _, optimizer = optimizers.build_optimizers(model, MUON)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with torch.profiler.profile() as profile:
        optimizer.step()
    products = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
    num_products = sum(e.count for e in profile.key_averages() if e.key in products)
    assert num_products == 4 * 15  # shapes, products in five iterations


def test_the_learning_rate_warms_up_then_falls_to_zero():
    both = optimizers.build_optimizers(VisionTransformer(**SMALL), MUON)
    schedulers = optimizers.build_schedulers(both, lambda step: optimizers.lr_factor(step, 10, 2))

    rates = []
    for _ in range(10):
        (rate,) = {scheduler.get_last_lr()[0] for scheduler in schedulers}
        rates.append(rate)
        for optimizer, scheduler in zip(both, schedulers, strict=True):
            optimizer.step()
            scheduler.step()

    cosine = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == pytest.approx(cosine)
    assert schedulers[0].get_last_lr()[0] == pytest.approx(0)


def test_the_average_of_the_weights_follows_its_formula():
    model = torch.nn.Linear(2, 1, bias=False)
    average = optimizers.WeightAverage(model, 0.5)
    expected = model.weight.detach().clone()

    for step in range(1, 9):
        with torch.no_grad():
            model.weight.add_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()

    torch.testing.assert_close(average.model.weight, expected)
    assert not average.model.weight.requires_grad
