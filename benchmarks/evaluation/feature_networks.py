"""Feature networks: pictures -> the features whose distributions are compared.

Inception makes a distance FID, KID or IS; any network of timm gives a distance of its own. Weights come from torch's
cache or a file and are known by their checksum. Missing weights are an error that says which file to put where, never a
reason to use another network.
"""

import contextlib
import http.client
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.networks.frozen import freeze, weights_checksum
from crossflow.networks.timm_networks import SCHEME, timm_network
from crossflow.released.files import read_weights

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
BATCH = 32


class FeatureNetwork:
    """Pictures uint8 (H, W, 3) -> {"features" (N, D), "logits" (N, K) if it classifies}, float32.

    network: frozen; run: pixels uint8 (B, 3, H, W) -> features and logits by `network`; words: what it is;
    is_inception: whether distances by it may be called FID, KID and IS.
    """

    def __init__(
        self, network: nn.Module, run: Callable[[Tensor], dict[str, Tensor]], words: str, *, is_inception: bool = False
    ) -> None:
        self.network, self.run, self.words, self.is_inception = network, run, words, is_inception
        self.checksum = weights_checksum(network)

    def to(self, device: torch.device) -> "FeatureNetwork":
        """Moves the network to a device and returns itself."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Features of N pictures, which may differ in size; equal sizes share batches."""
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
    """`inception`, `inception=FILE`, `timm:NAME`, `timm:NAME=FILE`, or `timm:NAME@random` (untrained weights).

    Raises UserError for an unknown source and for unavailable weights.
    """
    kind, _, place = source.partition("=")
    if kind == "inception":
        return _inception(place)
    if kind.startswith("timm:"):
        return _timm(source)
    if Path(source).expanduser().is_file():
        return _inception(source)
    raise UserError(
        f"Unknown feature network {source!r}. Use inception, inception=FILE, timm:NAME, timm:NAME=FILE, or "
        "timm:NAME@random."
    )


def _inception(place: str) -> FeatureNetwork:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = _inception_file(place)
    # torch-fidelity would unpickle whatever the file contains, so it gets a copy of what was read safely.
    buffer = io.BytesIO()
    torch.save(dict(read_weights(path)), buffer)
    buffer.seek(0)
    try:
        network = freeze(FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], buffer))
    except RuntimeError as error:
        raise UserError(f"{path} does not contain the Inception weights of torch-fidelity: {error}") from error

    def run(pixels: Tensor) -> dict[str, Tensor]:
        return dict(zip(("features", "logits"), network(pixels), strict=True))

    words = "InceptionV3 of TensorFlow 2015 by torch-fidelity, 299 px by TensorFlow 1's bilinear resize, pool3 2048"
    return FeatureNetwork(network, run, words, is_inception=True)


def _inception_file(place: str) -> Path:
    """The weights at `place`, else those in torch's cache, downloaded if they are missing. Raises UserError."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(place).expanduser() if place else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file() and not place and os.environ.get("HF_HUB_OFFLINE") != "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, http.client.HTTPException):  # the message below says what to do
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), progress=False)
    if not path.is_file():
        raise UserError(
            f"FID needs the Inception weights of torch-fidelity, but {path} does not exist. On a machine with a "
            f"connection download {URL_INCEPTION_V3} and put the file there, or give its path by "
            "--network features=inception=FILE. Without them, --network features=timm:NAME measures a distance by "
            "another network, which is not FID."
        )
    return path


def _timm(source: str) -> FeatureNetwork:
    import timm

    network: Any = timm_network(source, read_weights)  # has methods of timm
    name, is_random = source.removeprefix(SCHEME).partition("=")[0], "@" in source.partition("=")[0]

    settings = timm.data.resolve_data_config({}, model=network)
    side = settings["input_size"][-2:]
    mean, std = (torch.tensor(settings[key]).view(1, 3, 1, 1) for key in ("mean", "std"))

    def run(pixels: Tensor) -> dict[str, Tensor]:
        scaled = nn.functional.interpolate(pixels.float() / 255, side, mode="bicubic", antialias=True).clamp(0, 1)
        hidden = network.forward_features((scaled - mean.to(pixels.device)) / std.to(pixels.device))
        values = {"features": network.forward_head(hidden, pre_logits=True)}
        if network.num_classes:
            values["logits"] = network.forward_head(hidden)
        return values

    weights = ", untrained weights" if is_random else ""
    words = f"timm {name.partition('@')[0]}{weights}, {side[0]} px by antialiased bicubic resize"
    return FeatureNetwork(network, run, words)
