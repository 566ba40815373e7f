"""Which weights decay, the schedule, Muon's share, and the moving average against its formula."""

import math
from dataclasses import replace

import pytest
import torch

from models import VisionTransformer
from training import optimizers
from training.settings import Settings

SMALL = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
SETTINGS = Settings.from_dict({"lr": 1.0, "weight_decay": 0.1}).optimization
MUON = replace(SETTINGS, optimizer="muon")


def named_groups(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [({names[p] for p in group["params"]}, group["weight_decay"]) for group in optimizer.param_groups]


def test_weight_decay_is_on_the_matrices_alone():
    model = VisionTransformer(**SMALL)
    (optimizer,) = optimizers.build_optimizers(model, SETTINGS)
    (decayed, decay), (others, none) = named_groups(model, optimizer)
    assert (decay, none) == (0.1, 0.0)
    assert {"cls_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.bias", "head.bias"} <= others
    assert {"patch_embed.proj.weight", "blocks.1.mlp.fc2.weight", "head.weight"} <= decayed
    assert decayed | others == {name for name, _ in model.named_parameters()}
    assert not any(name.endswith("bias") or "norm" in name for name in decayed)


def test_muon_has_the_matrices_of_the_blocks():
    model = VisionTransformer(**SMALL)
    adamw, muon = optimizers.build_optimizers(model, MUON)
    ((by_muon, decay),) = named_groups(model, muon)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert by_muon == {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in layers}
    in_order = [p for name, p in model.named_parameters() if name in by_muon]  # the same in every process
    assert all(a is b for a, b in zip(muon.param_groups[0]["params"], in_order, strict=True))
    assert decay == 0.1
    rest = [names for names, _ in named_groups(model, adamw)]
    assert set.union(*rest) | by_muon == {name for name, _ in model.named_parameters()}
    assert not set.union(*rest) & by_muon


def test_the_schedule_warms_up_then_falls_to_zero():
    both = optimizers.build_optimizers(VisionTransformer(**SMALL), MUON)
    schedulers = optimizers.build_schedulers(both, warmup_fraction=0.2, total_steps=10)
    rates = []
    for _ in range(10):
        (rate,) = {scheduler.get_last_lr()[0] for scheduler in schedulers}
        rates.append(rate)
        for optimizer, scheduler in zip(both, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
    assert schedulers[0].get_last_lr()[0] == pytest.approx(0)


def test_the_average_follows_its_formula():
    model = torch.nn.Linear(2, 1, bias=False)
    average, expected = optimizers.WeightAverage(model, 0.5), model.weight.detach().clone()
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.add_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.model.weight, expected)
    assert not average.model.weight.requires_grad
