"""The notebooks run from top to bottom, and are kept without their output."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.analysis.test_collect import Collect, collect_command, write

__all__ = ["collect_command"]  # the fixture

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def execute(file: Path, folder: Path) -> list[nbformat.NotebookNode]:
    """What the code cells put out, run in ``folder``."""
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_kept_without_output(file: Path) -> None:
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.slow  # starts a kernel, which imports all
def test_the_results_are_read_and_drawn(collect_command: Collect, tmp_path: Path) -> None:
    for rank, accuracy in ((8, 0.4), (16, 0.6), (32, None)):
        write(f"r{rank}", rank, accuracy)
    assert collect_command()[0] == 0
    plots = len(list(Path("multirun/default/plots").iterdir()))
    outputs = execute(NOTEBOOKS[0], tmp_path)
    texts = "".join(output.get("text", "") for output in outputs)
    assert "multirun/default: 3 trials" in texts
    assert plots
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4 + plots


# starts a kernel too; the fast tier has no notebook run, as the table that it reads is tested elsewhere
@pytest.mark.slow
def test_a_notebook_without_results_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="run peftsweep-collect first"):
        execute(NOTEBOOKS[0], tmp_path)
