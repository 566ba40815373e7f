"""A stand-in for main.py that trains nothing. It records its call, and fails or hangs if told to.

It keeps main.py's side of the contract with the sweep: the lock, the exit codes, resuming from what
it has saved, leaving alone what another process has finished by the time it has the lock.
"""

import argparse
import fcntl
import json
import os
import pathlib
import signal
import sys
import time

parser = argparse.ArgumentParser()
for name in ("mask_type", "expansion_step", "seed", "dataset", "output_dir", "device"):
    parser.add_argument(f"--{name}")
parser.add_argument("--grad_accumulation", type=int, default=1)
parser.add_argument("--fail")  # the name of the run that should do it, as for the following flags
parser.add_argument("--fail_once")
parser.add_argument("--hang")
parser.add_argument("--deaf")  # hangs and ignores requests to stop
parser.add_argument("--out_of_memory")
parser.add_argument("--below", type=int, default=2)  # with fewer micro-batches, memory runs out
parser.add_argument("--ask_itself")
parser.add_argument("--seconds", type=float, default=0.0)
args = parser.parse_args()
name = "full" if args.mask_type == "full" else f"{args.mask_type}_expansion_{args.expansion_step}"
root = pathlib.Path(args.output_dir)
folder = root / args.dataset / name / f"seed_{args.seed}"
saved = folder / "last.pt"


def write_row(file, **row):
    with open(root / file, "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(json.dumps({"name": name, "seed": args.seed, **row}) + "\n")


def save_and_exit(number, frame):
    saved.write_text(str(seconds_done()))
    sys.exit(75)


def seconds_done():
    return done_before + time.monotonic() - began


began = time.monotonic()
done_before = float(saved.read_text()) if saved.exists() else 0.0
if args.deaf == name:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, save_and_exit)
    signal.signal(signal.SIGUSR1, save_and_exit)

lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print("stand-in: error: busy", file=sys.stderr)
    sys.exit(76)

config = {
    "format": 1,
    "settings": {
        "mask_type": args.mask_type,
        "expansion_step": int(args.expansion_step) if args.expansion_step else None,
        "dataset": args.dataset,
        "run_name": name,
        "seed": int(args.seed),
        "epochs": 1,
        "pool": "cls",
        "grad_accumulation": args.grad_accumulation,
    },
    "num_parameters": 1,
    "data": {"name": args.dataset, "label": "stand-in"},
    "attention": {"num_neighbors_nominal": 5, "num_neighbors_mean": 4.5, "num_patches": 16},
    "provenance": {"command": ["main.py", *sys.argv[1:]], "device": "stand-in"},
}
if (folder / "summary.json").exists():
    before = json.loads((folder / "config.json").read_text())
    if before["provenance"]["command"] == config["provenance"]["command"]:
        print(f"{folder} is finished; nothing to do")
        sys.exit(0)
(folder / "config.json").write_text(json.dumps(config))
print(f"resuming after {done_before:.1f} s" if done_before else "started", flush=True)
write_row(
    "calls.jsonl",
    gpu=os.environ.get("CUDA_VISIBLE_DEVICES"),
    device=args.device,
    pid=os.getpid(),
    parent=int(os.environ["LOCAL_ATTENTION_PARENT"]),
    start=began,
    resumed=done_before,
)

calls = [json.loads(line)["name"] for line in (root / "calls.jsonl").read_text().splitlines()]
if args.ask_itself == name and calls.count(name) == 1:
    os.kill(os.getpid(), signal.SIGUSR1)
while seconds_done() < args.seconds or name in (args.hang, args.deaf):
    time.sleep(0.02)
if args.out_of_memory == name and args.grad_accumulation < args.below:
    print("stand-in: error: out of memory", file=sys.stderr)
    sys.exit(77)
if args.fail == name or (args.fail_once == name and calls.count(name) == 1):
    print("a line before")
    sys.exit("stand-in: error: told to fail")

accuracy = 50.0 + int(args.seed)
row = {"epoch": 1, "step": 1, "eval_accuracy": accuracy, "train_images_per_second": 10.0}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
summary = {
    "format": 1,
    "final": row,
    "best": {"epoch": 1, "eval_accuracy": accuracy},
    "epochs": 1,
    "total_seconds": 1.0,
    "train_images_per_second": 10.0,
    "peak_memory_bytes": 2**30,
}
(folder / "summary.json").write_text(json.dumps(summary))
write_row("ends.jsonl", end=time.monotonic())
