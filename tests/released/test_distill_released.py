"""Released weights become runs of few steps by the same command."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from crossflow.cli import main
from crossflow.engine.sample import load


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dimr", "dit", "flowtok"])
def test_a_released_network_is_distilled(runs, blind_judge, tmp_path: Path, kind: str) -> None:
    """Small networks of the released forms: their guided flow is learned, and one evaluation makes a picture."""
    data = ["--data", "scenes", "data.num_train=4", "data.num_val=2", "train.steps=1", "train.batch_size=2"]
    run, method = tmp_path / "run", "composition" if kind == "dimr" else "derivative"
    assert main(["distill", str(runs(kind)), "--output", str(run), "--method", method, *data, "train.lr=1e-3"]) == 0
    weights = load_file(run / "model.safetensors")
    first_layers = [name for name in weights if "jump" in name and name.endswith("mlp.2.weight")]
    assert first_layers
    assert all(weights[name].abs().max() > 0 for name in first_layers), "the embeddings of jumps have learned nothing"
    pipe = load(run)
    assert pipe.task.config.interval.guidance == ((2.0, 2.0) if kind == "flowtok" else (7.0, 7.0))
    assert pipe("a red cube", steps=1, output_type="np")[0].ndim == 3
