"""The notebooks run from top to bottom on a checkpoint, on one device although it was saved on eight."""

from __future__ import annotations

import os
import pathlib

import pytest

import inspected

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "launch" / "notebooks"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    inspected.make(folder)
    return folder


def execute(name: str, workdir: pathlib.Path, monkeypatch):
    for key, value in {"WORKDIR": str(workdir), "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    if folder := os.environ.get("SIM_JAX_NOTEBOOKS_TO"):            # to look at
        nbformat.write(notebook, pathlib.Path(folder) / name)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return text, [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_inspect_params(workdir, monkeypatch):
    text, pictures = execute("inspect_params.ipynb", workdir, monkeypatch)
    assert "step 7; complete checkpoints: 3, 7" in text and "bytes per device" in text and "ema distance (ema_1k, ema_2k)" in text
    assert "generator/params/enc/in/weight" in text and len(pictures) == 2


def test_samples(workdir, monkeypatch):
    text, pictures = execute("samples.ipynb", workdir, monkeypatch)
    assert "1 network call an image; the teacher 5" in text and len(pictures) == 4


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_clean(path):
    """No outputs, no counts, ids; and the first code cell says what to set."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert "WORKDIR" in code[0].source and "WORKDIR" in notebook.cells[0].source
    assert notebook.metadata.get("widgets") is None
