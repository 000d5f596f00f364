"""How fast the papers' text-to-image models make pictures, and which part of them takes the time.

Weights are random, as speed does not depend on them: nothing is downloaded. The parts are those of one batch of
prompts: the CLIP text encoder, the source encoder, the flow with its guidance, and the decoder of the latents.
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
from crossflow.tasks.base import load_config, task_class

RECIPES = ("t2i_256_clip_dimr", "flowtok_xl")
BATCH_SIZE = 64
# A processor takes minutes for a batch of 64: one picture and a few steps show the same shares.
ON_CPU = {"batch_size": 1, "steps": 2}
PARTS = ("text_encoder", "source_encoder", "flow", "decoder")
ROUNDS = 3


def generation(
    recipes: Sequence[str] = RECIPES,
    overrides: Sequence[str] = (),
    *,
    batch_size: int | None = None,
    compiled: Sequence[bool] = (False, True),
    done: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """A row per recipe, with and without torch.compile: images per second, and the seconds of each of the `PARTS`.

    In bfloat16 on a GPU, in float32 on a CPU, where a batch of one and two steps stand for the rest. overrides:
    settings of the recipes; batch_size: pictures at once, 64 on a GPU. `done` after each row; medians of several
    rounds.
    """
    return [_row(name, overrides, batch_size, compile_it, done) for name in recipes for compile_it in compiled]


def _row(
    name: str, overrides: Sequence[str], batch_size: int | None, compile_it: bool, done: Callable[[], None]
) -> dict[str, Any]:
    device = find_device(None)
    on_gpu = device.type == "cuda"
    config = load_config(name, list(overrides))
    count = batch_size or (BATCH_SIZE if on_gpu else ON_CPU["batch_size"])
    steps = config.sample.steps if on_gpu else min(config.sample.steps, ON_CPU["steps"])
    stages = _stages(config, device, count, steps, compile_it)
    precision = torch.autocast(device.type, torch.bfloat16) if on_gpu else nullcontext()
    rounds: list[dict[str, float]] = []
    with torch.no_grad(), precision:
        for number in range(ROUNDS + 1):
            seconds, value = {}, torch.empty(0)
            for part, stage in zip(PARTS, stages, strict=True):
                seconds[part], value = _timed(stage, value, device)
            if number:  # the first round compiles and chooses kernels
                rounds.append(seconds)
    median = {part: statistics.median(one[part] for one in rounds) for part in PARTS}
    done()
    return {
        "recipe": name,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "precision": "bf16" if on_gpu else "float32",
        "compiled": compile_it,
        "batch_size": count,
        "steps": steps,
        "guidance": config.sample.guidance,
        "images_per_second": round(count / sum(median.values()), 4),
        **{f"{part}_seconds": round(seconds, 4) for part, seconds in median.items()},
    }


def _timed(stage: Callable[[Tensor], Tensor], value: Tensor, device: torch.device) -> tuple[float, Tensor]:
    begun = time.perf_counter()
    result = stage(value)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun, result


def _stages(
    config: Config, device: torch.device, count: int, steps: int, compile_it: bool
) -> list[Callable[[Tensor], Tensor]]:
    """Ids -> features -> z0 -> z1 -> pictures, as functions of what the one before gives."""
    text: Any = getattr(config, "text", None)
    if text is None or text.feature_width is None:
        raise UserError(
            "The speed of sampling is measured for text-to-image recipes that read a frozen text encoder "
            f"(text.feature_width), such as {', '.join(RECIPES)}."
        )
    torch.manual_seed(0)
    task = task_class(config.task).outline(config)
    model = task.build_model().to(device).eval()
    encoder = _clip(text.feature_width, text.max_length).to(device).eval()
    decode = _decoder(config, device)
    if compile_it:
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
        lambda z1: decode(z1, features),
    ]


def _clip(width: int, length: int) -> nn.Module:
    """The text tower of CLIP ViT-L/14, of that width."""
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


def _decoder(config: Any, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(z1, text features) -> pictures, by the codec that the recipe names: FlowTiTok, or Stable Diffusion's."""
    if config.codec.kind == "flowtitok":
        from crossflow.networks.codecs.flowtitok_network import FlowTiTokConfig, FlowTiTokDecoder

        tokenizer = FlowTiTokDecoder(
            FlowTiTokConfig(image_size=config.data.image_size, text_width=config.text.feature_width)
        )
        tokenizer = tokenizer.to(device).eval()
        return lambda z1, features: tokenizer(z1 / config.codec.scale, features)
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    autoencoder = autoencoder.to(device).eval()
    return lambda z1, features: autoencoder.decode(z1 / config.codec.scale).sample
