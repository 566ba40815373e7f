"""benchmark.py with small data pipelines and loops; real numbers are in experiments/benchmark."""

import pytest

import benchmark
import utils
from benchmarks import interop, pipeline, training
from interop import localize


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


def test_interop_benchmark_times_both_models(tmp_path, capsys):
    output = tmp_path / "interop.json"
    options = "--level interop --device cpu --model vit_tiny_patch16_224 --img_size 64 --rounds 3"
    options += " --expansion_step 1"
    assert benchmark.main([*options.split(), "--output", str(output)]) == 0

    report = utils.read_json(output)
    assert (report["num_tokens"], report["num_neighbors_mean"]) == (17, 100 / 16)
    assert report["largest_error"] < 1e-4
    rows = {(row["model"], row["pass"]): row for row in report["rows"]}
    assert len(rows) == 4
    for one_pass in interop.PASSES:
        assert rows["full", one_pass]["speedup"] == {"q1": 1, "median": 1, "q3": 1}
        assert rows["localized", one_pass]["milliseconds"]["median"] > 0
    forward, both = (rows["full", one_pass]["milliseconds"] for one_pass in interop.PASSES)
    assert both["median"] > forward["median"]

    # Per layer: 2 * 12 * 192**2 for each token, and 4 * 192 for each pair of tokens. Before and
    # after: the patches of 768 values, and the head of 1,000 classes.
    pairs = 100 + 2 * 16 + 1
    others = 12 * 17 * 24 * 192**2 + 2 * 16 * 768 * 192 + 2 * 1000 * 192
    flops = [others + 12 * 4 * 192 * number for number in (17**2, pairs)]
    assert report["ceiling"] == pytest.approx(flops[0] / flops[1])
    assert "arithmetic alone allows 1.0" in capsys.readouterr().out


def test_interop_benchmark_refuses_what_it_cannot_time(tmp_path, run_script, monkeypatch):
    def run(*options):
        output = ["--output", str(tmp_path / "interop.json")]
        return run_script(
            benchmark.main, "--level", "interop", "--device", "cpu", *options, *output
        )

    code, _, err = run("--model", "no_such_model")
    assert (code, err.count("\n")) == (2, 1)
    assert "timm cannot build 'no_such_model' for 896 px" in err
    code, _, err = run("--model", "swin_tiny_patch4_window7_224", "--img_size", "64")
    assert (code, err.count("\n")) == (2, 1)
    assert "localize knows VisionTransformer and Eva, not SwinTransformer" in err

    code, _, err = run("--mask_type", "2d_window")  # whose layers have different masks
    assert (code, err.count("\n")) == (2, 1)
    assert "invalid choice: '2d_window'" in err

    tiny = ("--model", "vit_tiny_patch16_224", "--img_size", "32")
    monkeypatch.setattr(interop, "localize", lambda model, spec: wrong(localize(model, spec)))
    code, _, err = run(*tiny)
    assert code == 1
    assert "is off by" in err


def wrong(model):
    model.head.weight.data.mul_(1.1)
    return model


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
