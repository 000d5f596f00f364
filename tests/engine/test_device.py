"""Everything with weights runs on one device and never makes the host wait for it; shown without a GPU.

Fake tensors have a device and a shape but no values: an operation on two devices raises, and so does reading a value.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from crossflow.core import sampling
from crossflow.core.batch import map_tensors
from crossflow.core.config import Config
from crossflow.core.noise import training_noise
from crossflow.core.settings import shipped
from crossflow.core.weights import shapes_only
from crossflow.data.item import Item
from crossflow.engine.joint.config import is_joint
from crossflow.engine.sample import load
from crossflow.engine.train import Run, TrainingSet
from crossflow.networks.codecs.autoencoders import AutoencoderKLCodec
from crossflow.networks.codecs.flowtitok import FlowTiTokCodec
from crossflow.networks.codecs.pixel import PixelCodec
from crossflow.networks.image_tower import SIGLIP_STATISTICS, ImageTower
from crossflow.networks.text.frozen_encoder import FrozenTextEncoder, TextEncoderSettings
from crossflow.networks.text.tokenizer import SPECIAL_TOKENS, build_tokenizer
from crossflow.tasks import load_config, task_class, task_names
from crossflow.tasks.base import Task

CUDA = torch.device("cuda")
CAPTIONS = ["a red cube", "a blue sphere left of a green cone"]
# caption_from_t2i needs a trained t2i run; the tasks of joint recipes have recipes of their own.
RECIPES = [name for name in shipped() if name != "caption_from_t2i" and not is_joint(name)]


class HostReads(TorchDispatchMode):
    """Counts the operations for which the host waits: values that are read, shapes that depend on values, and copies
    from a GPU to the CPU.
    """

    READING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        tensors = [value for value in args if isinstance(value, Tensor)]
        copied = isinstance(result, Tensor) and result.is_cpu and any(tensor.is_cuda for tensor in tensors)
        if name in self.READING or copied:
            self.counts[name] += 1
        return result


# -- recipes with small frozen networks of the widths that they expect


def autoencoder() -> nn.Module:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
    )


def codec_of(config: Any) -> nn.Module:
    from crossflow.networks.codecs.flowtitok_network import FlowTiTok, FlowTiTokConfig

    if config.codec.kind == "pixel":
        return PixelCodec(3, config.codec.factor)
    if config.codec.kind == "autoencoder_kl":
        return AutoencoderKLCodec(autoencoder())
    sizes = FlowTiTokConfig(
        image_size=config.data.image_size, encoder="tiny", decoder="tiny", text_width=config.text.feature_width
    )
    return FlowTiTokCodec(FlowTiTok(sizes))


def text_encoder(width: int, length: int) -> FrozenTextEncoder:
    import transformers

    if width > 1024:  # T5, whose heads may be narrow
        sizes = {"vocab_size": 400, "d_model": width, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
        network = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    else:
        sizes = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        sizes |= {"vocab_size": 400, "max_position_embeddings": length}
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        network = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **special))
    backend = build_tokenizer(CAPTIONS, 400, length).backend
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=SPECIAL_TOKENS[0])
    return FrozenTextEncoder(network, tokenizer, TextEncoderSettings(max_length=length))


def parts_of(config: Any) -> Any:
    """The parts of a text-to-image or captioning run, untrained."""
    from crossflow.tasks.caption import CaptionParts
    from crossflow.tasks.caption.decoder import TextAutoencoder
    from crossflow.tasks.t2i import TextToImageParts
    from crossflow.tasks.t2i.encoder import TextSide

    codec = codec_of(config)
    if config.task == "caption":
        settings = config.caption.autoencoder
        tokenizer = build_tokenizer(CAPTIONS, 400, settings.max_length)
        with shapes_only():
            text = TextAutoencoder(tokenizer, codec.latent_shape(config.data.image_size), settings)
        return CaptionParts(codec, text)
    if config.text.frozen:
        frozen = text_encoder(config.text.feature_width, config.text.max_length)
        return TextToImageParts(TextSide(config.text, frozen=frozen), codec)
    return TextToImageParts(TextSide(config.text, build_tokenizer(CAPTIONS, 400, config.text.max_length)), codec)


def untrained(config: Config) -> Task:
    kind = task_class(config.task)
    task = kind(config, parts_of(config)) if config.task in ("t2i", "caption") else kind.outline(config)
    if getattr(getattr(config, "tower", None), "frozen", False):
        network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, config.tower.width))
        task.__dict__["tower"] = ImageTower(network, 16, SIGLIP_STATISTICS, config.tower.width)
    return task


def on_fake_gpu(module: nn.Module) -> nn.Module:
    """The module with fake tensors on a GPU in place of parameters and buffers."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device=CUDA)
                part._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    return module


def item(size: int, number: int) -> Item:
    image = np.full((size, size + 8, 3), 40 * number, np.uint8)
    return Item(f"{number}", image, (CAPTIONS[number],), np.full(image.shape[:2], 2.0, np.float32))


def examples(task: Task, count: int = 2) -> list[Any]:
    size, generator = task.config.data.image_size, np.random.default_rng(0)
    items = [item(max(size, 64), number) for number in range(count)]
    return [task.transform(task.config, each, generator, augment=True) for each in items]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_samples_on_one_device_without_host_reads(name: str) -> None:
    config = load_config(name, ["backbone.depth=3", "source.depth=1"])  # the other layers are the same again
    task = untrained(config)
    record = task.collate(examples(task))
    noise = training_noise(0, 0, range(2), task.latent_shape)
    with shapes_only():
        model = task.build_model()
        objective = task.build_objective(model)
    values = CAPTIONS if task.input_kind == "text" else [np.zeros((64, 64, 3), np.uint8)] * 2
    pieces = [value for each in values for value in task.pieces(each).values[:1]]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, HostReads() as reads:
        task.device = CUDA
        for module in (objective, *task.networks):
            on_fake_gpu(module)
        batch = task.prepare(map_tensors(mode.from_tensor, record))
        (drawn,) = objective.draw([batch], [noise.to(CUDA)])
        losses = objective(drawn, noise.to(CUDA))
        assert all(loss.device.type == "cuda" and loss.dtype == torch.float32 for loss in losses.values())
        with torch.no_grad():
            source = task.source(pieces)
            z0 = model.source_encoder(source.features, source.mask).sample(noise=batch.target)
            z1 = sampling.generate(
                model, z0, condition=source.condition, steps=3, guidance=2.0, guidance_interval=(0.1, 0.5), zero_init=1
            )
            assert z1.device.type == "cuda"
            assert z1.dtype == torch.float32, "the state of the ODE"
            assert decoded(task, z1, source.features).device.type == "cuda"
    assert not reads.counts


def decoded(task: Task, z1: Tensor, features: Tensor) -> Tensor:
    """What `Task.decode` copies to the host."""
    if task.name == "caption":
        return task.text.logits(z1).argmax(-1)
    if task.name == "depth":
        return task.parts.scale.decode(z1)
    codec = task.networks[-1] if task.name == "sr" else task.codec
    return codec.decode(z1, features if codec.reads_text else None)


def test_fake_tensors_notice_a_host_read_and_a_second_device() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), HostReads() as reads:
        here, there = torch.ones(2), torch.ones(2, device=CUDA)
        there.cpu()
        assert reads.counts == {"_to_copy": 1}
        with pytest.raises(DataDependentOutputException):
            bool((there > 0).any())
        with pytest.raises(RuntimeError, match="at least two devices"):
            here + there


@pytest.mark.parametrize("name", task_names())
def test_a_training_step_reads_nothing_from_the_device(tiny_settings, tmp_path: Path, name: str) -> None:
    settings = [*tiny_settings(name), "guidance.drop=0.5", "train.accumulate=2"]
    run = Run.open(load_config(f"{name}_tiny", settings), tmp_path / "run")
    trainer, data = run.trainer(), TrainingSet(run.data, run.task)
    parts = next(trainer._steps(0, 2))
    trainer.learner.step(parts, 1e-3)  # builds the state of the optimizer
    record = data.collate(data.__getitems__([(0, 0), (0, 1)]))
    with HostReads() as reads:
        data.batch(record)
        trainer.learner.step(parts, 1e-3)
    assert not reads.counts


@pytest.mark.parametrize("name", task_names())
def test_a_sampling_step_reads_nothing_from_the_device(tiny_run, name: str) -> None:
    pipe = load(tiny_run(name))
    values = ["a red cube"] if name == "t2i" else [np.zeros((16, 16, 3), np.uint8)]
    counts = []
    for steps in (2, 6):
        with HostReads() as reads:
            guided = {"guidance": 2.0, "guidance_interval": (0.1, 0.8)} if pipe.task.config.guidance.drop else {}
            settings = pipe.sample_settings(steps=steps, zero_init=1, **guided)
            pipe.outputs(values, ["a"], 0, settings)
        counts.append(reads.counts)
    assert counts[0] == counts[1], "what is read does not depend on the number of steps"
    assert sum(counts[0].values()) <= 2, "whether latents and pixels are numbers"
