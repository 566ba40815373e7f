"""Run folders as main.py writes them, with made-up numbers, for tests of code that reads them."""

import masks
import utils

MEAN_NEIGHBORS = {None: 16.0, 1: 4.0, 2: 7.5, 3: 9.0, 4: 16.0}  # by expansion step


def write_run(
    root,
    mask_type="full",
    expansion_step=None,
    seed=0,
    accuracies=(50.0, 60.0),
    finished=True,
    run_name=None,
    **changes,
):
    """Write a run of len(accuracies) epochs to root/<dataset>/<run_name>/seed_<seed>.

    `changes` are settings, except `label` (of the data), `device_name`, `images_per_second`,
    `peak_memory_bytes` and `mean_neighbors`. Returns the folder.
    """
    label = changes.pop("label", "Digits")
    device = changes.pop("device_name", "Abacus")
    rate = changes.pop("images_per_second", 1000.0)
    memory = changes.pop("peak_memory_bytes", 2**30)
    neighbors = changes.pop("mean_neighbors", None) or MEAN_NEIGHBORS[expansion_step]

    mask = masks.MaskSpec(mask_type, expansion_step)
    settings = {
        "mask_type": mask_type,
        "expansion_step": expansion_step,
        "dataset": "digits",
        "run_name": run_name or mask.run_name,
        "seed": seed,
        "model": "vit_micro",
        "img_size": 16,
        "patch_size": 4,
        "pool": "cls",
        "epochs": max(1, len(accuracies)),
        "device": "cpu",
    } | changes
    is_known = mask_type in masks.MASK_TYPES
    config = {
        "format": 1,
        "settings": settings,
        "attention": {
            "grid": [4, 4],
            "num_patches": 16,
            "num_neighbors_nominal": mask.num_neighbors(4, 4) if is_known else 3,
            "num_neighbors_mean": neighbors,
            "attention_share_of_flops": 0.2,
            "forward_flops_per_image": 10_000_000,
        },
        "data": {
            "name": settings["dataset"],
            "label": label,
            "num_train": 100,
            "num_test": 20,
            "num_classes": 10,
        },
        "num_parameters": 12345,
        "provenance": {
            "command": ["main.py"],
            "git_commit": "0123456789abcdef",
            "git_dirty": True,
            "versions": {"python": "3.11.2", "torch": "2.15.0"},
            "device": device,
        },
    }
    rows = [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "train_loss": 2.0 / epoch,
            "train_accuracy": accuracy - 5,
            "eval_loss": 1.0 / epoch + 0.1 * seed,
            "eval_accuracy": accuracy,
            "train_images_per_second": rate,
            "epoch_seconds": 110 / rate,
            "train_seconds": 100 / rate,
            "eval_images_per_second": 2 * rate,
            "peak_memory_bytes": memory,
        }
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]

    folder = utils.run_folder(root, settings["dataset"], settings["run_name"], seed)
    folder.mkdir(parents=True)
    utils.write_json(folder / utils.CONFIG, config)
    utils.write_json_lines(folder / utils.METRICS, rows)
    if finished:
        summary = {
            "format": 1,
            "final": rows[-1],
            "total_seconds": len(rows) * 100 / rate,
            "train_images_per_second": rate,
            "peak_memory_bytes": memory,
        }
        utils.write_json(folder / utils.SUMMARY, summary)
    return folder
