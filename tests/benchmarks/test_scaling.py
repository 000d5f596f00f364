"""The plan for many GPUs beside what is counted: bytes on the wire between processes, files of a checkpoint."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from crossflow.benchmarks.scaling import Machines, scaling, sent_bytes
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.engine.health.plan import plan
from crossflow.tasks import load_config

MACHINES = Machines(samples_per_second=100, network=1e9, disk=1e9)

COUNTING = """
import json, sys
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from crossflow.core import distributed
from crossflow.core.training.sharding import shard

class Count(TorchDispatchMode):
    sent = 0.0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, world = str(func), distributed.world_size()
        if "c10d" in name:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            # The larger of input and output is what a ring passes on.
            largest = max((tensor.nbytes for tensor in tensors), default=0)
            self.sent += largest * (world - 1) / world * (2 if "allreduce" in name else 1)
        return func(*args, **(kwargs or {}))

distributed.device()
model = nn.ModuleDict({"first": nn.Linear(8, 16), "blocks": nn.ModuleList(nn.Linear(16, 16) for _ in range(3))})
class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, x):
        x = self.model["first"](x)
        for block in self.model["blocks"]:
            x = block(x).relu()
        return x.square().mean()
root = Root()
shard(root, list(model["blocks"]))
root(torch.ones(2, 8)).backward()  # the first step also exchanges what it needs to know
with Count() as count:
    root(torch.ones(2, 8)).backward()
if distributed.is_main():
    open(sys.argv[1], "w").write(json.dumps(count.sent))
"""


@pytest.mark.slow
def test_bytes_on_the_wire_are_those_counted_in_a_sharded_step(forked: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "counting.py"
    program.write_text(COUNTING)
    for process in forked.ranks(4, [str(program), str(tmp_path / "sent.json")], tmp_path):
        process.finish()
    of_blocks = 4 * 3 * (16 * 16 + 16)
    expected = sent_bytes(of_blocks + 4 * (8 * 16 + 16), of_blocks, gpus=4, sharded_parts=1)
    assert json.loads((tmp_path / "sent.json").read_text()) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sr", "depth"])
def test_memory_is_that_of_the_plan_and_a_checkpoint_has_its_size(task: str, tiny_run, tiny_settings) -> None:
    config = load_config(f"{task}_tiny", tiny_settings(task))
    (row,) = scaling(config, [1], MACHINES)
    assert row.activations is not None
    assert row.state + row.activations == plan(config).peak  # measured in tests/engine/health/test_plan.py
    written = sum(path.stat().st_size for path in next(tiny_run(task).glob("checkpoints/*")).glob("*.safetensors"))
    assert row.checkpoint == pytest.approx(written, rel=0.1)


@pytest.mark.slow
def test_sharding_divides_the_state_and_sends_half_as_much_again() -> None:
    config = load_config("t2i_256_clip_dimr", ["data.train=folder:nowhere"])
    alone, whole, shared = scaling(config, [1, 64], Machines(120, 50e9, 2e9))
    assert alone.sent == 0
    assert alone.slowest == alone.fastest == pytest.approx(120)
    assert shared.state == -(-whole.state // 64)
    assert 1 < shared.sent / whole.sent < 1.5
    assert whole.slowest < whole.fastest <= 64 * 120 + 1
    assert alone.tokens == 32 * 32 + 16 * 16  # both resolutions of a latent of 32 x 32
    with pytest.raises(UserError, match="multiple of"):
        scaling(config, [3], MACHINES)


@pytest.mark.slow
def test_the_command_prints_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["benchmark", "plan", "t2i_256_clip_dimr", "--samples-per-second", "120", "--gpus"]
    assert main([*arguments, "1,8"]) == 0
    output = capsys.readouterr().out
    assert "Assumed:" in output
    assert output.count("GPUs  ") == output.count("tokens/s\n") == 3
    assert main([*arguments, "1,x"]) == 2
