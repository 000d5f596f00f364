"""An interrupted run is the uninterrupted one, bit for bit, for each task and everything that a step may consist of.

Ten items in batches of four: the run is interrupted in the first epoch and in the second, and ends in the third.
"""

from pathlib import Path
from types import ModuleType

import pytest

from crossflow.cli import main
from crossflow.core.training.checkpoint import checkpoints

pytestmark = pytest.mark.slow

RUN = ["data.num_train=10", "train.batch_size=4", "train.ema=0.9", "train.log_every=2", "train.save_every=50"]
VARIANTS = {
    "t2i": ["train.accumulate=2", "train.precision=bf16", "source.trunk=small", "guidance.drop=0.3"],
    "caption": ["caption.joint=true", "train.accumulate=2", "train.num_workers=1"],
    "depth": ["train.num_workers=2", "train.optimizer=muon", "depth.augmentation.colour=0.2"],
    "sr": ["train.precision=bf16", "train.schedule=cosine", "train.accumulate=4", "source.kind=variational"],
}


def final_bits(run: Path) -> dict[str, bytes]:
    """Everything of the last checkpoint, and the published weights."""
    newest = checkpoints(run / "checkpoints")[0]
    assert newest.name == "step_00000006"
    files = {file.name: file.read_bytes() for file in newest.iterdir()}
    return files | {f"run/{file.name}": file.read_bytes() for file in run.glob("*.safetensors")}


@pytest.mark.parametrize("task", VARIANTS)
def test_an_interrupted_run_is_the_uninterrupted_one(
    tiny_settings, blind_judge, no_java, tmp_path: Path, task: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train = ["train", "--task", task, *tiny_settings(task), *RUN, *VARIANTS[task], "--output"]
    assert main([*train, str(whole), "train.steps=6"]) == 0
    # A schedule knows the number of steps, so the first part is ended by its time.
    assert main([*train, str(parts), "train.steps=6", "train.max_minutes=0.0000001"]) == 0
    assert checkpoints(parts / "checkpoints")[0].name == "step_00000001"
    if task != "sr":
        assert (
            main(["train", "--output", str(parts), "--resume", "auto", "train.max_minutes=null", "train.steps=4"]) == 0
        )
    resume = ["train", "--output", str(parts), "--resume", "auto", "train.max_minutes=null", "train.steps=6"]
    assert main(resume) == 0
    assert final_bits(whole) == final_bits(parts)


def test_two_interrupted_processes_are_two_uninterrupted_ones(
    tiny_settings, forked: ModuleType, tmp_path: Path
) -> None:
    train = ["-m", "crossflow", "train", "--task", "depth", *tiny_settings("depth"), *RUN, "train.num_workers=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, steps in ((whole, 6), (parts, 3), (parts, 6)):
        arguments = [*train, "--output", str(folder), "--resume", "auto", f"train.steps={steps}", "train.accumulate=2"]
        for process in forked.ranks(2, arguments, tmp_path):
            process.finish()
    assert final_bits(whole) == final_bits(parts)
