"""How fast the papers' text-to-image models sample pictures, and which of their parts takes the time.

Weights are random, since speed does not depend on them: nothing is downloaded. The parts of one batch of prompts are
the CLIP text encoder, the source encoder, the flow with its guidance, and the decoder of the latents.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from crossflow.core.config import Config
from crossflow.core.errors import UserError
from crossflow.core.sampling import generate
from crossflow.core.training.prepare import compile_blocks
from crossflow.engine.sample import find_device
from crossflow.tasks import load_config, task_class

RECIPES = ("t2i_256_clip_dimr", "flowtok_xl")
BATCH_SIZE = 64
ON_CPU = {"batch_size": 1, "steps": 2}
"""A CPU takes minutes for a batch of 64; one picture and two steps show the same shares."""
PARTS = ("text_encoder", "source_encoder", "flow", "decoder")
ROUNDS = 3
Stage = Callable[[Tensor], Tensor]


def sampling_speed(
    recipes: Sequence[str] = RECIPES,
    overrides: Sequence[str] = (),
    *,
    batch_size: int | None = None,
    compiled: Sequence[bool] = (False, True),
    on_row: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """A row per recipe, with and without torch.compile: images per second, and the seconds of each of the `PARTS`.

    Medians of three rounds, in bfloat16 on a GPU; in float32 on a CPU, where two steps stand for the rest.

    Args:
        overrides: settings of the recipes.
        batch_size: pictures at a time; None: 64 on a GPU, 1 on a CPU.
        on_row: called after each row.
    """
    rows = []
    for name in recipes:
        for is_compiled in compiled:
            rows.append(_row(name, overrides, batch_size, is_compiled))
            on_row()
    return rows


def _row(name: str, overrides: Sequence[str], batch_size: int | None, compiled: bool) -> dict[str, Any]:
    device = find_device(None)
    on_gpu = device.type == "cuda"
    config = load_config(name, list(overrides))
    count = batch_size or (BATCH_SIZE if on_gpu else ON_CPU["batch_size"])
    steps = config.sample.steps if on_gpu else min(config.sample.steps, ON_CPU["steps"])
    stages = _stages(config, device, count, steps, compiled)
    precision = torch.autocast(device.type, torch.bfloat16) if on_gpu else nullcontext()
    with torch.no_grad(), precision:
        _round(stages, device)  # compiles, and chooses kernels
        rounds = [_round(stages, device) for _ in range(ROUNDS)]
    median = {part: statistics.median(seconds[part] for seconds in rounds) for part in PARTS}
    return {
        "recipe": name,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "precision": "bf16" if on_gpu else "float32",
        "compiled": compiled,
        "batch_size": count,
        "steps": steps,
        "guidance": config.sample.guidance,
        "images_per_second": round(count / sum(median.values()), 4),
        **{f"{part}_seconds": round(seconds, 4) for part, seconds in median.items()},
    }


def _round(stages: Sequence[Stage], device: torch.device) -> dict[str, float]:
    """Seconds of each part in one pass through all of them."""
    seconds, value = {}, torch.empty(0)
    for part, stage in zip(PARTS, stages, strict=True):
        start = time.perf_counter()
        value = stage(value)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[part] = time.perf_counter() - start
    return seconds


def _stages(config: Config, device: torch.device, count: int, steps: int, compiled: bool) -> list[Stage]:
    """Ids -> features -> z0 -> z1 -> pictures; each stage takes the output of the previous one."""
    text, codec = getattr(config, "text", None), getattr(config, "codec", None)
    if text is None or codec is None or text.feature_width is None:
        raise UserError(
            "Sampling is timed for text-to-image recipes with a frozen text encoder (text.feature_width), such as "
            f"{', '.join(RECIPES)}; this recipe is for {config.task}."
        )
    torch.manual_seed(0)
    task = task_class(config.task).outline(config)
    model = task.build_model().to(device).eval()
    encoder = _clip(text.feature_width, text.max_length).to(device).eval()
    decoder = (
        _flowtitok(config.data.image_size, text.feature_width) if codec.kind == "flowtitok" else _StableDiffusion()
    )
    decoder = decoder.to(device).eval()
    if compiled:
        compile_blocks(model)
    ids = torch.randint(0, 1000, (count, text.max_length), device=device)
    mask = torch.ones(count, text.max_length, dtype=torch.bool, device=device)
    features = torch.empty(0)

    def read(_: Tensor) -> Tensor:
        nonlocal features
        features = encoder(ids).last_hidden_state.float()
        return features

    def flow(z0: Tensor) -> Tensor:
        settings = config.sample
        return generate(model, z0, steps=steps, guidance=settings.guidance, time_grid=settings.time_grid).float()

    return [
        read,
        lambda value: model.source_encoder(value, mask).sample(generator=torch.Generator(device).manual_seed(0)),
        flow,
        lambda z1: decoder(z1 / codec.scale, features),
    ]


def _clip(width: int, length: int) -> nn.Module:
    """The text tower of CLIP ViT-L/14 with another width."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=12,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=length,
            projection_dim=width,
        )
    )


def _flowtitok(image_size: int, text_width: int) -> nn.Module:
    """(tokens (B, N, C), text features) -> pictures."""
    from crossflow.networks.codecs.flowtitok_network import FlowTiTokConfig, FlowTiTokDecoder

    return FlowTiTokDecoder(FlowTiTokConfig(image_size=image_size, text_width=text_width))


class _StableDiffusion(nn.Module):
    """(latents (B, 4, H, W), text features, which it ignores) -> pictures."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        self.autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        pictures: Tensor = self.autoencoder.decode(latents).sample
        return pictures
