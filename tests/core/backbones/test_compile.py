"""Compiled blocks: one graph per kind of block, without breaks, and never compiled again while a run goes on."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from crossflow.core.backbones import build_backbone
from crossflow.core.config import BackboneConfig
from crossflow.core.guidance import indicator_guidance
from crossflow.core.model import CrossFlow
from crossflow.core.source import SourceEncoder
from crossflow.core.training.prepare import compile_blocks

LATENT = (2, 8, 8)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def dimr() -> nn.Module:
    config = BackboneConfig(name="dimr", width=16, depth=3, heads=2, num_stages=2)
    return build_backbone(config, LATENT)


def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(size, *LATENT), torch.rand(size), torch.arange(size) % 2 == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dit", "rotary", "dimr"])
def test_blocks_are_whole_graphs_that_serve_every_step_guided_or_not(tiny_dit: Callable, kind: str) -> None:
    positions = {"positions": "rotary"} if kind == "rotary" else {}
    backbone = dimr() if kind == "dimr" else tiny_dit(LATENT, **positions)
    counter = CompileCounter()
    compile_blocks(backbone, backend=counter)
    for _ in range(2):
        backbone(*batch(6))[-1].sum().backward()
    backbone(*batch(4))[-1].sum().backward()  # the first other size makes the batch dimension dynamic
    graphs = counter.frame_count
    assert graphs > 0
    for size in (6, 5, 3):
        backbone(*batch(size))[-1].sum().backward()
    assert counter.frame_count == graphs, "a smaller last batch compiled again"
    model = CrossFlow(SourceEncoder(None, "gaussian", LATENT), backbone)
    with torch.no_grad():
        sizes = []
        for guidance in (1.0, 3.0, 1.0, 3.0):
            velocity = indicator_guidance(model, guidance)
            for t in (0.0, 0.25, 0.5):
                velocity(torch.randn(4, *LATENT), t)
            sizes.append(counter.frame_count)
    assert sizes[1:] == [sizes[1]] * 3, "steps or a change of guidance compiled again"
    assert not torch._dynamo.utils.counters["graph_break"]
