"""The networks that measure: opened when a metric first needs them, known by the checksum of their weights."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crossflow.benchmarks.evaluation.feature_networks import FeatureNetwork, feature_network
from crossflow.core.errors import UserError, unknown_name
from crossflow.networks.frozen import freeze, weights_checksum
from crossflow.released.files import read_weights

Opener = Callable[[str, torch.device], Any]
"""(source, device) -> a network with a `checksum`."""


class MeasuringNetworks(Mapping[str, Any]):
    """Networks by role, such as features, lpips or a role that a task's scoring defines.

    sources: role -> id, folder or file, as a protocol names them; openers: those of the task. A network is opened at
    the first look-up; `checksums` lists those opened so far.
    """

    def __init__(
        self, sources: Mapping[str, str], device: torch.device, openers: Mapping[str, Opener] | None = None
    ) -> None:
        self.sources, self.device = dict(sources), device
        self.checksums: dict[str, str] = {}
        self._openers: dict[str, Opener] = {"features": _features, "lpips": Lpips, **(openers or {})}
        self._opened: dict[str, Any] = {}

    def __getitem__(self, role: str) -> Any:
        """The network of a role; KeyError for a role without a source, UserError for unavailable weights."""
        if role not in self._opened:
            source = self.sources[role]
            if role not in self._openers:
                raise unknown_name("role of a measuring network", role, self._openers)
            self._opened[role] = self._openers[role](source, self.device)
            self.checksums[role] = self._opened[role].checksum
        return self._opened[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def features(self) -> FeatureNetwork:
        """The feature network of a protocol with a distance."""
        network: FeatureNetwork = self["features"]
        return network


def _features(source: str, device: torch.device) -> FeatureNetwork:
    return feature_network(source).to(device)


LPIPS_FILES = {"alex": ("alexnet", "alexnet-owt-7be5be79.pth"), "vgg": ("vgg16", "vgg16-397923af.pth")}
"""Backbone -> its name in torchvision and the file of its weights in torch's cache."""


class Lpips:
    """LPIPS (Zhang et al., 2018) between two pictures uint8 (H, W, 3), by torchmetrics' calibrated layers.

    source: alex or vgg, with the weights in torch's cache, or alex=FILE, vgg=FILE. Raises UserError without weights.
    """

    def __init__(self, source: str, device: torch.device | None = None) -> None:
        from torchmetrics.functional.image.lpips import _LPIPS
        from torchvision import models

        kind, _, place = source.partition("=")
        if kind not in LPIPS_FILES:
            raise UserError(f"Unknown LPIPS backbone {source!r}. Use alex, vgg, alex=FILE or vgg=FILE.")
        name, file = LPIPS_FILES[kind]
        path = Path(place).expanduser() if place else Path(torch.hub.get_dir()) / "checkpoints" / file
        if not path.is_file():
            raise UserError(
                f"LPIPS needs torchvision's weights of {name}, but {path} does not exist. Put {file} there, or give "
                f"its path by --network lpips={kind}=FILE."
            )
        classifier = getattr(models, name)(weights=None)
        classifier.load_state_dict(read_weights(path))
        network = _LPIPS(pretrained=True, net=kind, pnet_rand=True)
        layers = dict(classifier.features.named_children())
        for stage in network.net.children():  # the slices keep the numbers of the classifier's layers
            for number, layer in stage.named_children():
                if list(layer.parameters()):
                    layer.load_state_dict(layers[number].state_dict())
        self.device = device or torch.device("cpu")
        self.network = freeze(network).to(self.device)
        self.checksum = weights_checksum(self.network)

    @torch.no_grad()
    def __call__(self, a: np.ndarray, b: np.ndarray) -> float:
        """The distance between pictures a and b, at least 0."""
        pair = [torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1 for picture in (a, b)]
        return float(self.network(*(pixels.to(self.device) for pixels in pair)))
