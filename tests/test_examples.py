"""The examples run, and show what they say."""

import subprocess
import sys

import nbclient
import nbformat
import pytest

import utils

EXAMPLES = utils.REPOSITORY / "examples"


def outputs_of(cell):
    """What a cell printed and showed, as text."""
    texts = [output.get("text", "") for output in cell.outputs]
    texts += [data for output in cell.outputs for data in output.get("data", {}).values()]
    return "\n".join(texts)


def test_the_notebook_runs():
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), "kept clean"

    resources = {"metadata": {"path": EXAMPLES}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    shown = [outputs_of(cell) for cell in cells]
    assert "image/png" in str(cells[2].outputs)
    text = "\n".join(shown)
    assert "equal to SDPA with the mask: True" in text
    assert "changed by the mask: True" in text
    assert "the same again without: True" in text
    assert "equal to timm's attn_mask: True" in text
    assert "40 runs of 8 patterns" in text
    assert "| 2d_all_neighbors, step 2 |" in text


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_the_scripts_run(script):
    command = [sys.executable, str(script), "--img_size", "64"]
    command += ["--model", "vit_tiny_patch16_224"]
    done = subprocess.run(command, cwd=utils.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, full, local = done.stdout.splitlines()
    assert first == "vit_tiny_patch16_224: 4x4 patches, each attends to 5x5 around it"
    assert full.startswith("full ")
    assert local.startswith("local ")
    assert full.endswith("ms, one forward pass")
