"""benchmark.py with small data pipelines and loops; real numbers are in experiments/benchmark."""

import pytest

import benchmark
import utils
from benchmarks import pipeline, training


def test_training_benchmark_relates_each_loop_to_the_others(tmp_path):
    output = tmp_path / "training.json"
    options = "--level training --device cpu --model vit_micro --img_size 16 --patch_size 8 "
    options += "--batch_size 8 --steps 1 --rounds 3 --workers 0"
    assert benchmark.main([*options.split(), "--output", str(output)]) == 0

    report = utils.read_json(output)
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == 7
    assert all(len(row["images_per_second"]) == 3 and row["of_matmul"] > 0 for row in rows.values())
    assert rows["timm, PIL, DataLoader, fp32"]["of_usual"] == 1
    assert rows["this repository, strong, bf16"]["of_bare"] > 0
    assert rows["bare model, fp32"]["of_bare"] is None
    assert report["matmul_flops_per_second"].keys() == {"fp32", "bf16"}


def test_without_timm_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(utils.UserError, match=r"pip install -r requirements-dev\.txt"):
        benchmark.main(["--level", "training", "--output", str(tmp_path / "training.json")])


def test_pipeline_benchmark_compares_like_with_like(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "NUM_IMAGES", {32: 256, 64: 128})
    monkeypatch.setattr(pipeline, "NUM_PIL_IMAGES", {32: 128, 64: 128})
    output = tmp_path / "pipeline.json"
    options = "--level pipeline --device cpu --workers 0"
    assert benchmark.main([*options.split(), "--output", str(output)]) == 0

    report = utils.read_json(output)
    names = report["images_per_second_at_64"].keys()
    pil_names = {name for name in names if name.startswith("PIL")}
    assert pil_names == {f"PIL and DataLoader: {name}" for name in names - pil_names}

    printed = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    assert len(printed) == 12
    assert sum(line.endswith(" 1.0 x PIL") for line in printed) >= 6
