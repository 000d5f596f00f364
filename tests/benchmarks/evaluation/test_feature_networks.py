"""Feature networks and LPIPS: known by their weights, unavailable ones explained, files read without executing them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crossflow.benchmarks.evaluation.feature_networks import INCEPTION_FILE, feature_network
from crossflow.benchmarks.evaluation.networks import Lpips, MeasuringNetworks
from crossflow.core.errors import UserError

TINY = "timm:test_resnet@random"


@pytest.mark.slow
def test_a_timm_network_is_identified_by_its_weights(tmp_path: Path) -> None:
    network = feature_network(TINY)
    assert not network.is_inception
    assert "untrained weights" in network.words
    assert network.checksum == feature_network(TINY).checksum
    pictures = [np.random.default_rng(k).integers(0, 255, (40, 40 + k, 3), dtype=np.uint8) for k in range(3)]
    together = network(pictures)["features"]
    for k, picture in enumerate(pictures):
        np.testing.assert_allclose(network([picture])["features"][0], together[k], atol=1e-5)
    torch.save(network.network.state_dict(), tmp_path / "w.pth")
    again = feature_network(f"timm:test_resnet={tmp_path / 'w.pth'}")
    assert again.checksum == network.checksum
    np.testing.assert_allclose(again(pictures)["features"], together, atol=1e-5)


@pytest.mark.slow
def test_unavailable_weights_are_explained_with_file_and_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"{INCEPTION_FILE}.*put the file there.*not FID"):
        feature_network("inception")
    with pytest.raises(UserError, match=r"gone\.pth.*does not exist"):
        feature_network("timm:test_resnet=gone.pth")
    with pytest.raises(UserError, match="timm network"):
        feature_network("timm:resnot50")
    with pytest.raises(UserError, match="Unknown feature network"):
        feature_network("clip")
    with pytest.raises(UserError, match=r"alexnet-owt.*lpips=alex=FILE"):
        Lpips("alex")
    (tmp_path / "bad.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="more than tensors"):
        feature_network(f"inception={tmp_path / 'bad.pth'}")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not contain the weights"):
        feature_network(f"timm:test_resnet={tmp_path / 'other.pth'}")


def test_measuring_networks_open_at_the_first_look_up_and_report_their_checksums() -> None:
    networks = MeasuringNetworks({"features": TINY, "judge": "mine"}, torch.device("cpu"), {"judge": Judge})
    assert networks.checksums == {}
    assert networks["judge"] is networks["judge"]
    assert networks.checksums == {"judge": "mine on cpu"}
    assert len(networks.features.checksum) == 64
    assert set(networks.checksums) == {"judge", "features"} == set(networks)


class Judge:
    """A network that a task opens for a role of its own."""

    def __init__(self, source: str, device: torch.device) -> None:
        self.checksum = f"{source} on {device}"


def test_roles_without_a_source_or_an_opener_are_errors() -> None:
    networks = MeasuringNetworks({"judge": "mine"}, torch.device("cpu"))
    with pytest.raises(KeyError):
        networks["clip"]
    with pytest.raises(UserError, match="role of a measuring network"):
        networks["judge"]


@pytest.mark.slow
def test_inception_weights_are_read_without_executing_anything(tmp_path: Path, monkeypatch) -> None:
    """The architecture with random weights, saved as the published file is."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    kind = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(kind, "load_state_dict", lambda *a, **k: None)
        torch.manual_seed(0)
        random = kind("inception", ["2048", "logits_unbiased"])
    torch.save(random.state_dict(), tmp_path / "w.pth")
    network = feature_network(f"inception={tmp_path / 'w.pth'}")
    picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    values = network([picture, picture])
    expected = random(torch.from_numpy(picture).permute(2, 0, 1)[None])
    np.testing.assert_allclose(values["features"][0], expected[0][0].numpy(), atol=1e-5)
    assert values["logits"].shape == (2, 1008)
    assert network.is_inception


@pytest.mark.slow
def test_lpips_takes_its_backbone_from_a_file(tmp_path: Path) -> None:
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision import models

    torch.manual_seed(0)
    backbone = models.alexnet(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "alex.pth")
    distance = Lpips(f"alex={tmp_path / 'alex.pth'}")
    a, b = (np.random.default_rng(k).integers(0, 255, (64, 64, 3), dtype=np.uint8) for k in range(2))
    assert distance(a, a) == pytest.approx(0, abs=1e-6)
    assert distance(a, b) > 1e-4
    reference = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    loaded = {
        f"net.slice{s}.{n}.{kind}" for s, n in ((1, 0), (2, 3), (3, 6), (4, 8), (5, 10)) for kind in ("weight", "bias")
    }
    assert loaded <= set(reference.state_dict())
    reference.load_state_dict(
        {name: backbone.state_dict()["features." + name.split(".", 2)[2]] for name in loaded}, strict=False
    )
    pair = [torch.from_numpy(x).permute(2, 0, 1)[None].float() / 127.5 - 1 for x in (a, b)]
    with torch.no_grad():
        assert distance(a, b) == pytest.approx(float(reference(*pair)), abs=1e-6)
    assert len(distance.checksum) == 64
