"""The notebooks of docs/notebooks run from top to bottom, and are kept without outputs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def cells(name: str) -> list[dict[str, Any]]:
    return list(json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"])


@pytest.fixture
def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """executed(name, **values): the variables after all cells, with others for those that a cell of its own sets.

    IPython runs the cells in this process: a kernel would import torch once more.
    """
    shell_module = pytest.importorskip("IPython.core.interactiveshell")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(name: str, **values: object) -> dict[str, Any]:
        shell = shell_module.InteractiveShell()
        for cell in cells(name):
            if cell["cell_type"] == "code":
                shell.run_cell("".join(cell["source"])).raise_error()
                shell.user_ns.update({key: value for key, value in values.items() if key in shell.user_ns})
        assert values.keys() <= shell.user_ns.keys()
        return dict(shell.user_ns)

    return run


@pytest.mark.slow
def test_the_latent_space_is_shown(executed, tiny_run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run("t2i"), tmp_path / "run")
    variables = executed("latent_space", run="run")
    assert len(variables["solution"].trajectory) == 9
    assert variables["inversion"].error < 1


@pytest.mark.slow
def test_trainings_are_compared(executed, tiny_settings, blind_judge) -> None:
    variables = executed("training", settings=[*tiny_settings("depth"), "train.log_every=1"])
    assert len(variables["curve"].steps) == 2
    assert variables["scores"]["abs_rel"] > 0


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_outputs_are_kept(name: str) -> None:
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert code
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
