"""Measure the speed and memory of local attention against full attention without a mask.

    python benchmark.py                    # attention alone: masks, steps, grids and backends
    python benchmark.py --level model      # whole models
    python benchmark.py --level pipeline   # the data pipeline, compared with PIL and a DataLoader
    python benchmark.py --level training   # training, compared with the bare model and timm
    python benchmark.py --level interop    # timm's ViT at a high resolution, full and localized
    python benchmark.py --quick            # attention on two grids, ~15 seconds
    python benchmark.py --plot FILE.json   # redraw the plots of an earlier measurement

Each candidate is first checked against dense attention, both its output and its gradient. Then all
candidates of a grid take turns in one process, so that noise of the machine affects all of them
alike, and speed ratios are taken within each round. Compiling and warming up happen before and are
reported separately. On CUDA, what is timed is the GPU's own work, replayed as a CUDA graph; the
time of a call, with its launches from Python, is reported beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import masks
import models
import utils
from benchmarks import charts, interop, pipeline, timing, training
from benchmarks.candidates import (
    BACKENDS,
    DTYPES,
    Candidate,
    attention_candidates,
    shapes_on,
    usable_backends,
)
from benchmarks.memory import PEAK_MEMORY_IS, peak_memory_of
from benchmarks.whole_models import model_candidates
from report import figures
from runtime import hardware
from utils import UserError, json_list, number_type

FORMAT = 1
COMPILE = training.COMPILE_MODES
DESCRIPTIONS = {  # by --level
    "attention": "Time attention patterns and backends, forward and backward.",
    "model": "Time whole models by attention pattern and backend, forward and backward.",
    "pipeline": "Images/s of the data pipeline, compared with PIL, torchvision and a DataLoader.",
    "training": "Images/s of training end to end, compared with the bare model and a typical loop.",
    "interop": "Time timm's ViT at a high resolution, as it is and with local attention.",
}
QUICK = {  # defaults with --quick: ~15 seconds on two cores
    "mask_types": ["2d_all_neighbors"],
    "expansion_steps": [1],
    "grids": [14, 28],
    "rounds": 7,
}
OTHER_LEVELS = {"pipeline": pipeline, "training": training, "interop": interop}

# Largest allowed error against float64, for values around 1: a few units in the last place, which
# add up in long sums.
TOLERANCES = {"fp32": 1e-4, "bf16": 6e-2}


# -------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv=None):
    """Each level has its own flags; `--level training --help` shows those of training."""
    argv = sys.argv[1:] if argv is None else argv
    level = _find_level(argv)

    parser = utils.ArgumentParser(description=DESCRIPTIONS.get(level, DESCRIPTIONS["attention"]))
    parser.add_argument(
        "--level",
        choices=DESCRIPTIONS,
        default="attention",
        help="what to measure; add --help to see the flags of a level",
    )
    parser.add_argument(
        "--device",
        choices=hardware.DEVICES,
        default="auto",
        help="auto: CUDA, else MPS, else the CPU",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON report (default: experiments/benchmark/<level>_<device>.json)",
    )
    if level in OTHER_LEVELS:
        OTHER_LEVELS[level].add_arguments(parser)
        return parser.parse_args(argv)

    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def _find_level(argv: list[str]) -> str:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--level", default="attention")
    try:
        return finder.parse_known_args(argv)[0].level
    except argparse.ArgumentError:  # the real parser reports it
        return "attention"


def add_arguments(parser: utils.ArgumentParser) -> None:
    """Add the flags of the levels attention and model."""
    positive = number_type(int, minimum=1)
    patterns = parser.add_argument_group("patterns and backends")
    patterns.add_argument(
        "--mask_types",
        type=json_list(str, masks.MASK_TYPES[1:]),
        default=list(masks.STUDIED[1:]),
        metavar="JSON",
        help="attention patterns",
    )
    patterns.add_argument(
        "--expansion_steps",
        type=json_list(int),
        default=[1, 2],
        metavar="JSON",
        help="expansion steps of each pattern",
    )
    patterns.add_argument(
        "--backends",
        type=json_list(str, BACKENDS),
        default=[name for name in BACKENDS if name not in ("auto", "uncompiled")],
        metavar="JSON",
        help="what to compare with full attention; those that cannot run here are left out",
    )

    sizes = parser.add_argument_group("sizes")
    sizes.add_argument(
        "--grids",
        type=json_list(int),
        metavar="JSON",
        help="sides of the patch grids, in patches (default: 14, 28, 56, 112; on CUDA 14, 28, 64, "
        "128)",
    )
    sizes.add_argument(
        "--class_token",
        action="store_true",
        help="add one global token to attention alone; models always have one",
    )
    sizes.add_argument(
        "--separate",
        action="store_true",
        help="give attention alone q, k and v as three tensors, each [B, H, T, D], instead of the "
        "packed [B, T, 3, H, D] of a model",
    )
    sizes.add_argument("--batch_size", type=positive, help="images per batch (default: by grid)")
    sizes.add_argument(
        "--num_heads",
        type=positive,
        help="attention heads (default: by grid; for models by preset)",
    )
    sizes.add_argument(
        "--head_dim", type=positive, default=64, help="channels per head, for attention alone"
    )
    sizes.add_argument(
        "--model", choices=models.PRESETS, default="vit_tiny", help="size preset for --level model"
    )
    sizes.add_argument("--depth", type=positive, help="blocks of the model (default: by preset)")
    sizes.add_argument(
        "--dtype", choices=DTYPES, help="data type of q, k and v (default: fp32; on CUDA bf16)"
    )
    sizes.add_argument(
        "--compile",
        choices=COMPILE,
        default="off",
        help="torch.compile mode of whole models, as in main.py",
    )

    protocol = parser.add_argument_group("measuring")
    protocol.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    protocol.add_argument(
        "--rounds",
        type=number_type(int, minimum=3),
        default=9,
        help="how often each candidate is timed",
    )
    protocol.add_argument(
        "--quick",
        action="store_true",
        help="unless other flags say otherwise: one pattern, on grids 14 and 28, in 7 rounds",
    )
    protocol.add_argument(
        "--plot", type=Path, metavar="FILE", help="redraw the plots of a report; measure nothing"
    )


def check_arguments(parser: utils.ArgumentParser, args) -> None:
    """Fill in what depends on the device; refuse what doesn't go together."""
    device = hardware.pick_device(args.device)
    args.grids = args.grids or list(shapes_on(device))
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    if args.compile != "off" and args.level != "model":
        parser.error(f"argument --compile: for --level model, got --level {args.level}")

    largest = max(args.grids)
    if largest**2 > masks.MAX_PATCHES:
        limit = math.isqrt(masks.MAX_PATCHES)
        parser.error(f"argument --grids: at most {limit} patches per side, got {largest}")
    if 0 in args.grids:
        parser.error("argument --grids: a grid has at least 1 patch per side, got 0")


# -------------------------------------------------------------------------------------------------
# Measuring


def prepare(candidates: list[Candidate], tolerance: float, device: torch.device) -> None:
    """Run each candidate once, which compiles it, and check it.

    Raises UserError if one computes something else than it should.
    """
    hidden = not sys.stderr.isatty()
    for candidate in tqdm(candidates, "checking", leave=False, disable=hidden):
        candidate.first_seconds = hardware.seconds_of(candidate.run, device)
        if candidate.check is None:
            candidate.error = None
            continue

        candidate.error = candidate.check()
        if not candidate.error <= tolerance:  # True for NaN as well
            raise UserError(
                f"{candidate.name} is off by {candidate.error:.1e} from dense attention "
                f"(allowed: {tolerance:.0e}); a wrong result is not timed"
            )


def measure_grid(args, grid: int, backends: list[str], device: torch.device) -> list[dict]:
    build = attention_candidates if args.level == "attention" else model_candidates
    return measure_candidates(build(args, grid, backends, device), args, grid, device)


def measure_candidates(
    candidates: list[Candidate], args, grid: int, device: torch.device
) -> list[dict]:
    """Check the candidates, time them in rounds, and return one row for each.

    The first candidate is the one to which the others are compared.
    """
    prepare(candidates, TOLERANCES[args.dtype], device)

    # A new random order in each round, so that no candidate always follows the same other one.
    order = np.random.default_rng(0)
    runs = {candidate.name: candidate.run for candidate in candidates}
    timers = list(timing.timers_of(runs, device).values())
    seconds = np.empty((args.rounds, len(candidates)))
    call_seconds = np.empty_like(seconds)  # with the launches, on CUDA
    rounds = range(args.rounds)
    hidden = not sys.stderr.isatty()
    for round_number in tqdm(rounds, f"grid {grid}x{grid}", leave=False, disable=hidden):
        for index in order.permutation(len(candidates)):
            seconds[round_number, index] = timers[index]()
            if device.type == "cuda":
                run = candidates[index].run
                call_seconds[round_number, index] = hardware.seconds_of(run, device)

    speedups = seconds[:, :1] / seconds
    rows = []
    for index, candidate in enumerate(candidates):
        row = {
            "grid": grid,
            "num_patches": grid * grid,
            "num_sequences": candidate.num_sequences,
            "mask_type": candidate.mask.mask_type,
            "expansion_step": candidate.mask.expansion_step,
            "num_neighbors_mean": candidate.num_neighbors_mean,
            "backend": candidate.backend,
            "milliseconds": quartiles(1e3 * seconds[:, index]),
            "speedup": quartiles(speedups[:, index]),
            "ceiling": candidate.ceiling,
            "peak_memory_bytes": peak_memory_of(candidate.run, device),
            "first_run_seconds": candidate.first_seconds,
            "largest_error": candidate.error,
        }
        if device.type == "cuda":
            row["call_milliseconds"] = quartiles(1e3 * call_seconds[:, index])
            row["replays_graph"] = timers[index].replays_graph
        rows.append(row)
    return rows


def quartiles(values: np.ndarray) -> dict[str, float]:
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"q1": q1, "median": median, "q3": q3}


def measure(args, argv: list[str]) -> tuple[dict, Path]:
    """Measure all grids; returns the report (settings, machine, rows) and its file.

    The file is written after each grid, so an interrupt loses one grid at most.
    """
    machine_tuned = hardware.keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = hardware.pick_device(args.device)
    backends, left_out = usable_backends(args.backends, args.level, device)
    for name, reason in left_out.items():
        print(f"left out: {name} ({reason})", flush=True)

    settings = {}
    for key, value in vars(args).items():
        settings[key] = str(value) if isinstance(value, Path) else value
    report = {
        "format": FORMAT,
        "level": args.level,
        "settings": settings,
        "left_out": left_out,
        "threads": torch.get_num_threads(),
        "malloc_keeps_freed_memory": machine_tuned,
        "milliseconds_are": timing.TIMES_ARE[device.type],
        "first_run_is": "with compiling, or with reading what an earlier run compiled from torch's "
        "cache on disk",
        "memory_is": PEAK_MEMORY_IS[device.type],
        "protocol": f"forward and backward, {args.rounds} rounds of all candidates in one process, "
        "each round in a random order, after a first run of each",
        "provenance": hardware.provenance(argv, device),
        "rows": [],
    }

    output = output_of(args)
    for grid in args.grids:
        rows = measure_grid(args, grid, backends, device)
        report["rows"] += rows
        utils.write_json(output, report)
        print(format_rows(rows), flush=True)
    print(f"wrote {output}")
    return report, output


def output_of(args) -> Path:
    """The file of the report; creates its folder."""
    device = hardware.pick_device(args.device)
    default = Path("experiments") / "benchmark" / f"{args.level}_{device.type}.json"
    output = args.output or default
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


# -------------------------------------------------------------------------------------------------
# Results


def format_rows(rows: list[dict]) -> str:
    """A table with one line per candidate.

    `x full` is the speed relative to full attention, and `ceiling` the most it could be.
    """
    times = f"{'ms':>9} {'[q1, q3]':<18}"
    speedups = f"{'x full':>7} {'[q1, q3]':<16}"
    header = f"{'grid':>7}  {'mask':<26}{'backend':<16}{times}{speedups}ceiling  MiB"
    return "\n".join([header, *map(_format_row, rows)])


def _format_row(row: dict) -> str:
    mask = row["mask_type"]
    if row["expansion_step"] is not None:
        mask += f" {row['expansion_step']}"

    ms = row["milliseconds"]
    speedup = row["speedup"]
    ms_range = f"[{ms['q1']:.2f}, {ms['q3']:.2f}]"
    speedup_range = f"[{speedup['q1']:.2f}, {speedup['q3']:.2f}]"
    times = f"{ms['median']:>9.2f} {ms_range:<18}"
    speedups = f"{speedup['median']:>7.2f} {speedup_range:<16}"

    memory = row["peak_memory_bytes"]
    mebibytes = "-" if memory is None else f"{memory / 2**20:.0f}"
    label = f"{row['grid']:>3}x{row['grid']:<3}  {mask:<26}{row['backend']:<16}"
    return f"{label}{times}{speedups}{row['ceiling']:>7.1f}  {mebibytes}"


def read_report(path: Path) -> dict:
    report = utils.read_json(path)
    if report.get("format") != FORMAT or not report.get("rows"):
        raise UserError(f"{path} is not a report of benchmark.py in format {FORMAT}; measure again")
    return report


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.level in OTHER_LEVELS:
        output = output_of(args)
        OTHER_LEVELS[args.level].measure(args, argv, output)
        print(f"wrote {output}")
        return 0

    if args.plot is None:
        report, output = measure(args, argv)
    else:
        report, output = read_report(args.plot), args.plot
    drawings = {f"{output.stem}_{kind}": draw for kind, draw in charts.drawings(report).items()}
    failed = figures.save_drawings(output.parent, drawings)
    figures.raise_failed(failed)
    print(f"plotted time, speedup and memory next to {output}")
    return 0


if __name__ == "__main__":
    utils.run_cli(main)
