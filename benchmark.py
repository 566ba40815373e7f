"""Speed and memory of local attention, measured honestly: a forward and backward against full attention without a mask.

    python benchmark.py                      # attention alone, over masks, steps, grids and backends
    python benchmark.py --level model        # whole models
    python benchmark.py --level pipeline     # images/s of the data pipeline, and of PIL images through a DataLoader
    python benchmark.py --level training     # images/s of training, beside the bare model and the usual loop
    python benchmark.py --quick              # under a minute
    python benchmark.py --plot FILE.json     # the pictures again, from what was measured

Each candidate is first checked against dense attention, output and gradient. All candidates of a grid are then timed in
one process, in turns, so that a noisy machine is noisy to all of them alike; a ratio is taken within each turn.
Compiling and warming up come before and are reported apart.
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
from benchmarks import charts, pipeline, training
from benchmarks.candidates import BACKENDS, DTYPES, Candidate, attention_candidates, model_candidates, usable_backends
from benchmarks.memory import PEAK_MEMORY_IS, peak_memory_of
from report import figures
from runtime import hardware
from utils import UserError, json_list, number_type

FORMAT = 1
WHAT_IS_TIMED = {  # by --level
    "attention": "Time attention patterns and backends, forward and backward.",
    "model": "Time whole models by attention pattern and backend, forward and backward.",
    "pipeline": "Images/s of the data pipeline, beside PIL images, torchvision's transforms and a DataLoader.",
    "training": "Images/s of training, end to end, beside the bare model and the loop as often written.",
}
OTHER_LEVELS = {"pipeline": pipeline, "training": training}
# Largest error against float64, of values around 1: a few units in the last place, and the sums of many.
TOLERANCES = {"fp32": 1e-4, "bf16": 6e-2}


def parse_args(argv=None):
    """Each level has flags of its own: `--level training --help` shows those of training."""
    argv = sys.argv[1:] if argv is None else argv
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--level", default="attention")
    try:
        level = finder.parse_known_args(argv)[0].level
    except argparse.ArgumentError:  # said by the parser below
        level = "attention"

    parser = utils.ArgumentParser(description=WHAT_IS_TIMED.get(level, WHAT_IS_TIMED["attention"]))
    level_help = "what is measured; each has flags of its own, which --help shows beside it"
    parser.add_argument("--level", choices=WHAT_IS_TIMED, default="attention", help=level_help)
    parser.add_argument("--device", choices=hardware.DEVICES, default="auto", help="auto: CUDA, else MPS, else the CPU")
    output_help = "JSON (default: experiments/benchmark/<level>_<device>.json)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output_help)
    if level in OTHER_LEVELS:
        OTHER_LEVELS[level].add_arguments(parser)
        return parser.parse_args(argv)
    add_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def add_arguments(parser: utils.ArgumentParser) -> None:
    """Of the levels attention and model."""
    positive = number_type(int, minimum=1)
    parser.add_argument(
        "--mask_types",
        type=json_list(str, masks.MASK_TYPES[1:]),
        default=list(masks.MASK_TYPES[1:]),
        metavar="JSON",
        help="patterns",
    )
    parser.add_argument("--expansion_steps", type=json_list(int), default=[1, 2], metavar="JSON", help="reaches")
    parser.add_argument(
        "--grids", type=json_list(int), default=[14, 28, 56, 112], metavar="JSON", help="patches a side"
    )
    parser.add_argument(
        "--backends",
        type=json_list(str, BACKENDS),
        default=["dense", "diagonal", "flex", "local-attention", "natten"],
        metavar="JSON",
        help="what to time beside full attention; those that cannot run here are named and left out",
    )
    parser.add_argument(
        "--class_token", action="store_true", help="attention alone with one global token; models always have one"
    )
    parser.add_argument("--batch_size", type=positive, help="images (default: by grid)")
    parser.add_argument("--num_heads", type=positive, help="heads (default: by grid; of the model: by preset)")
    parser.add_argument("--head_dim", type=positive, default=64, help="channels a head, attention alone")
    parser.add_argument(
        "--model", choices=models.PRESETS, default="vit_tiny", help="size of the model, with --level model"
    )
    parser.add_argument("--depth", type=positive, help="blocks of the model (default: by preset)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of queries, keys and values")
    parser.add_argument("--threads", type=positive, help="of the CPU (default: torch's)")
    parser.add_argument("--rounds", type=number_type(int, minimum=3), default=9, help="timed turns of all candidates")
    parser.add_argument("--quick", action="store_true", help="one pattern, grids 14 and 28, 7 rounds")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the pictures of a JSON again, and measure nothing"
    )


def check_arguments(parser: utils.ArgumentParser, args) -> None:
    if max(args.grids) ** 2 > masks.MAX_PATCHES:
        parser.error(f"argument --grids: at most {math.isqrt(masks.MAX_PATCHES)} patches a side, got {max(args.grids)}")
    if 0 in args.grids:
        parser.error("argument --grids: a grid has at least 1 patch a side, got 0")
    if args.quick:  # under a minute on two cores
        args.mask_types, args.expansion_steps, args.grids, args.rounds = ["2d_all_neighbors"], [1], [14, 28], 7


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def prepare(candidates: list[Candidate], tolerance: float, device: torch.device) -> None:
    """Run each once, which compiles it, and check it. Raises UserError for one that computes something else."""
    for candidate in tqdm(candidates, "checking", leave=False, disable=not sys.stderr.isatty()):
        candidate.first_seconds = hardware.seconds_of(candidate.run, device)
        candidate.error = None if candidate.check is None else candidate.check()
        if candidate.error is not None and not candidate.error <= tolerance:
            raise UserError(
                f"{candidate.name} is off by {candidate.error:.1e} from dense attention (allowed: "
                f"{tolerance:.0e}); a wrong result is not timed"
            )


def measure_grid(args, grid: int, backends: list[str], device: torch.device) -> list[dict]:
    """One row a candidate: quartiles of milliseconds, of the ratio to full attention within each turn, and memory."""
    build = attention_candidates if args.level == "attention" else model_candidates
    return measure_candidates(build(args, grid, backends, device), args, grid, device)


def measure_candidates(candidates: list[Candidate], args, grid: int, device: torch.device) -> list[dict]:
    """Check the candidates, then time them in turns; the first one is what the others are compared with."""
    prepare(candidates, TOLERANCES[args.dtype], device)
    seconds = np.empty((args.rounds, len(candidates)))
    order = np.random.default_rng(0)  # reshuffled each round, so that no candidate always follows the same one
    for turn in tqdm(range(args.rounds), f"grid {grid}x{grid}", leave=False, disable=not sys.stderr.isatty()):
        for index in order.permutation(len(candidates)):
            seconds[turn, index] = hardware.seconds_of(candidates[index].run, device)
    ratios = seconds[:, :1] / seconds
    memory = [peak_memory_of(candidate.run, device) for candidate in candidates]
    return [
        {
            "grid": grid,
            "num_patches": grid * grid,
            "num_sequences": candidate.num_sequences,
            **vars(candidate.mask),  # mask_type, expansion_step
            "num_neighbors_mean": candidate.num_neighbors_mean,
            "backend": candidate.backend,
            "milliseconds": quartiles(1e3 * seconds[:, index]),
            "speedup": quartiles(ratios[:, index]),
            "ceiling": candidate.ceiling,
            "peak_memory_bytes": memory[index],
            "first_run_seconds": candidate.first_seconds,
            "largest_error": candidate.error,
        }
        for index, candidate in enumerate(candidates)
    ]


def quartiles(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("q1", "median", "q3"), np.quantile(values, [0.25, 0.5, 0.75]).tolist(), strict=True))


def format_rows(rows: list[dict]) -> str:
    """The table, one line a candidate; `x full` is the speed relative to full attention, its ceiling beside it."""
    lines = [
        f"{'grid':>7}  {'mask':<26}{'backend':<16}{'ms':>9} {'[q1, q3]':<18}{'x full':>7} {'[q1, q3]':<16}ceiling  MiB"
    ]
    for row in rows:
        ms, speedup, memory = row["milliseconds"], row["speedup"], row["peak_memory_bytes"]
        step = "" if row["expansion_step"] is None else f" {row['expansion_step']}"
        ranges = [f"[{values['q1']:.2f}, {values['q3']:.2f}]" for values in (ms, speedup)]
        lines.append(
            f"{row['grid']:>3}x{row['grid']:<3}  {row['mask_type'] + step:<26}{row['backend']:<16}{ms['median']:>9.2f} "
            f"{ranges[0]:<18}{speedup['median']:>7.2f} {ranges[1]:<16}{row['ceiling']:>7.1f}  "
            + ("-" if memory is None else f"{memory / 2**20:.0f}")
        )
    return "\n".join(lines)


def measure(args, argv: list[str]) -> tuple[dict, Path]:
    """The report (settings, machine, rows) and its file, written after each grid: an interrupt loses one grid."""
    machine_tuned = hardware.keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = hardware.pick_device(args.device)
    backends, left_out = usable_backends(args.backends, args.level, device)
    for name, reason in left_out.items():
        print(f"left out: {name} ({reason})", flush=True)
    report = {
        "format": FORMAT,
        "level": args.level,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "left_out": left_out,
        "threads": torch.get_num_threads(),
        "malloc_keeps_freed_memory": machine_tuned,
        "first_run_is": "with compiling, or with reading from torch's cache on disk what an earlier run compiled",
        "memory_is": PEAK_MEMORY_IS[device.type],
        "protocol": f"forward and backward, {args.rounds} turns of all candidates in one process, each turn in a "
        "random order, after a first run of each",
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
    """The file of the report; its folder is made."""
    device = hardware.pick_device(args.device)
    output = args.output or Path("experiments") / "benchmark" / f"{args.level}_{device.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.level in OTHER_LEVELS:
        output = output_of(args)
        OTHER_LEVELS[args.level].measure(args, argv, output)
        print(f"wrote {output}")
        return 0
    if args.plot is not None:
        report, output = utils.read_json(args.plot), args.plot
        if report.get("format") != FORMAT or not report.get("rows"):
            raise UserError(f"{args.plot} is no report of benchmark.py of format {FORMAT}; measure again")
    else:
        report, output = measure(args, argv)
    drawings = {f"{output.stem}_{kind}": draw for kind, draw in charts.drawings(report).items()}
    failed = figures.save_drawings(output.parent, drawings)
    figures.raise_failed(failed)
    print(f"drew time, speedup and memory beside {output}")
    return 0


if __name__ == "__main__":
    utils.run_cli(main)
