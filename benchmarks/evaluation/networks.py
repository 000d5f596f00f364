"""The networks that measure: feature networks of distances, CLIP, detector, LPIPS. Found by id, folder or file.

Each is known by the checksum of its weights, which stands in the manifest. When one cannot be had, the message says
what to put where; nothing is replaced by something else.
"""

import functools
import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crossflow.core.errors import PARSING_ERRORS, UserError, unknown_name
from crossflow.core.files import read_tensors
from crossflow.networks.frozen import freeze, load_public, weights_checksum

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
BATCH = 32


class FeatureNetwork:
    """Pictures uint8 (H, W, 3) -> {"features" (N, D), "logits" (N, K) where it classifies}, float32.

    is_inception: whether distances by it are FID, KID and IS; otherwise they are called by their own names.
    """

    def __init__(
        self,
        source: str,
        network: nn.Module,
        run: Callable[[Tensor], dict[str, Tensor]],
        is_inception: bool,
        words: str,
    ) -> None:
        self.source, self.network, self.run, self.is_inception, self.words = source, network, run, is_inception, words
        self.checksum = weights_checksum(network)

    def to(self, device: torch.device) -> "FeatureNetwork":
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Pictures may differ in size."""
        device = next(self.network.parameters()).device
        rows: list[dict[str, Tensor]] = []
        for start in range(0, len(pictures), BATCH):
            part = pictures[start : start + BATCH]
            same = len({picture.shape for picture in part}) == 1
            for group in [part] if same else [[picture] for picture in part]:
                pixels = torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2).contiguous()
                rows.append({name: value.float().cpu() for name, value in self.run(pixels.to(device)).items()})
        return {name: torch.cat([row[name] for row in rows]).numpy() for name in rows[0]}


def feature_network(source: str) -> FeatureNetwork:
    """`inception`, `inception=FILE`, `timm:NAME`, `timm:NAME=FILE`, or `timm:NAME@random` (weights never trained).

    Raises UserError when it cannot be had.
    """
    kind, _, place = source.partition("=")
    if kind == "inception":
        return _inception(source, place)
    if kind.startswith("timm:"):
        return _timm(source, kind.removeprefix("timm:"), place)
    if Path(source).expanduser().is_file():
        return _inception(source, source)
    raise UserError(
        f"The feature network {source!r} is unknown. Give inception, inception=FILE, timm:NAME, timm:NAME=FILE, or "
        "timm:NAME@random."
    )


def _inception(source: str, place: str) -> FeatureNetwork:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = Path(place).expanduser() if place else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file() and not place and os.environ.get("HF_HUB_OFFLINE") != "1":
        try:
            torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, progress=False, weights_only=True)
        except (OSError, RuntimeError):  # no connection, or a wrong checksum; reported below
            path.with_suffix(".part").unlink(missing_ok=True)
    if not path.is_file():
        raise UserError(
            f"FID needs the Inception weights of torch-fidelity, and there is no {path}. On a machine with a "
            f"connection download {URL_INCEPTION_V3} and put the file there, or give its place by "
            "--network features=inception=FILE. Without them --network features=timm:NAME measures a distance by "
            "another network, which is not FID."
        )
    # torch-fidelity unpickles whatever the file holds; so it gets what was read safely before
    buffer = io.BytesIO()
    torch.save(read_weights(path), buffer)
    buffer.seek(0)
    try:
        network = freeze(FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], buffer))
    except RuntimeError as error:
        raise UserError(f"{path} does not hold the Inception weights of torch-fidelity: {error}") from error

    def run(pixels: Tensor) -> dict[str, Tensor]:
        return dict(zip(("features", "logits"), network(pixels), strict=True))

    words = "InceptionV3 of TensorFlow 2015 by torch-fidelity, 299 px by TensorFlow 1's bilinear resize, pool3 2048"
    return FeatureNetwork(source, network, run, True, words)


def _timm(source: str, name: str, place: str) -> FeatureNetwork:
    import timm

    name, _, mode = name.partition("@")
    if name.split(".")[0] not in timm.list_models():
        raise unknown_name("timm network", name, timm.list_models(f"*{name.split('_')[0]}*") or timm.list_models()[:20])
    if mode not in ("", "random"):
        raise UserError(f"{source!r}: behind the @ stands random or nothing.")
    if mode or place:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = timm.create_model(name)
        if place:
            path = Path(place).expanduser()
            if not path.is_file():
                raise UserError(f"There is no file {path} with weights of {name}.")
            try:
                network.load_state_dict(read_weights(path))
            except RuntimeError as error:
                raise UserError(f"{path} does not hold the weights of timm's {name}: {str(error)[:300]}") from error
    else:
        files = "model.safetensors and config.json of the network"
        network = load_public(functools.partial(timm.create_model, pretrained=True), name, files=files)
    network = freeze(network)
    settings = timm.data.resolve_data_config({}, model=network)
    side = settings["input_size"][-2:]
    mean, std = (torch.tensor(settings[key]).view(1, 3, 1, 1) for key in ("mean", "std"))

    def run(pixels: Tensor) -> dict[str, Tensor]:
        scaled = nn.functional.interpolate(pixels.float() / 255, side, mode="bicubic", antialias=True).clamp(0, 1)
        hidden = network.forward_features((scaled - mean.to(pixels.device)) / std.to(pixels.device))
        found = {"features": network.forward_head(hidden, pre_logits=True)}
        if network.num_classes:
            found["logits"] = network.forward_head(hidden)
        return found

    words = f"timm {name}{', weights never trained' if mode else ''}, {side[0]} px by antialiased bicubic resize"
    return FeatureNetwork(source, network, run, False, words)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file; nothing in it is run. Raises UserError."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (*PARSING_ERRORS, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as weights: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} holds no table of tensors.")
    return found


def lpips(backbone: str) -> tuple[Callable[[np.ndarray, np.ndarray], float], str]:
    """LPIPS (Zhang et al., 2018) between pictures uint8 (H, W, 3), and the checksum of its weights.

    backbone: alex or vgg, from torch's cache of weights, or alex=FILE, vgg=FILE. Raises UserError.
    """
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision import models

    kind, _, place = backbone.partition("=")
    known = {"alex": ("alexnet", "alexnet-owt-7be5be79.pth"), "vgg": ("vgg16", "vgg16-397923af.pth")}
    if kind not in known:
        raise UserError(f"LPIPS has the backbones alex and vgg, or alex=FILE and vgg=FILE; {backbone!r} came.")
    name, file = known[kind]
    path = Path(place).expanduser() if place else Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        raise UserError(
            f"LPIPS needs torchvision's weights of {name}, and there is no {path}. Put {file} there, or give its place "
            f"by --network lpips={kind}=FILE."
        )
    classifier = getattr(models, name)(weights=None)
    classifier.load_state_dict(read_weights(path))
    network = _LPIPS(pretrained=True, net=kind, pnet_rand=True)
    layers = dict(classifier.features.named_children())
    for stage in network.net.children():  # the slices keep the numbers of the classifier's layers
        for number, layer in stage.named_children():
            if list(layer.parameters()):
                layer.load_state_dict(layers[number].state_dict())
    freeze(network)

    @torch.no_grad()
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        pair = [torch.from_numpy(one).permute(2, 0, 1)[None].float() / 127.5 - 1 for one in (a, b)]
        return float(network(*pair))

    return distance, weights_checksum(network)


class Networks(Mapping[str, Any]):
    """The networks of a protocol by role, each opened at its first use; `checksums` are of those that were opened.

    openers: role -> (source, device) -> network with a `checksum`, for the roles that belong to the task.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        device: torch.device,
        openers: Mapping[str, Callable[[str, torch.device], Any]] | None = None,
    ) -> None:
        self.sources, self.device, self.openers = dict(sources), device, dict(openers or {})
        self.checksums: dict[str, str] = {}
        self._opened: dict[str, Any] = {}

    def __getitem__(self, role: str) -> Any:
        if role not in self._opened:
            source = self.sources[role]
            if role == "features":
                network: Any = feature_network(source).to(self.device)
                self.checksums[role] = network.checksum
            elif role == "lpips":
                network, self.checksums[role] = lpips(source)
            elif role in self.openers:
                network = self.openers[role](source, self.device)
                self.checksums[role] = network.checksum
            else:
                raise unknown_name("role of a measuring network", role, ["features", "lpips", *self.openers])
            self._opened[role] = network
        return self._opened[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def features(self) -> FeatureNetwork:
        """The feature network of distances."""
        network: FeatureNetwork = self["features"]
        return network
