"""Depth recipes read wide pictures alike everywhere: the law that holds before any training."""

import pytest
import torch

from crossflow.core.settings import shipped
from crossflow.tasks import load_config, task_class

SMALL = [
    *("data.image_size=16", "source.width=32", "source.depth=1"),
    *("backbone.width=16", "backbone.depth=1", "backbone.heads=2", "backbone.patch=4"),
]


@torch.no_grad()
@pytest.mark.parametrize("recipe", sorted(name for name in shipped() if name.startswith("depth")))
def test_an_object_is_read_alike_wherever_it_lies_in_a_wide_picture(recipe: str):
    """Four columns of patches in training, 36 in the picture, an object in two places that are apart from the borders
    by more than attention and convolutions reach: source latents and velocities agree.
    """
    torch.manual_seed(0)
    task = task_class("depth").outline(load_config(recipe, SMALL))
    model = task.build_model().eval()
    for parameter in model.parameters():  # a fresh backbone is the identity
        parameter.add_(0.2 * torch.randn_like(parameter))
    rgb = torch.zeros(2, 3, 16, 144)
    rgb[0, :, 4:12, 56:64] = rgb[1, :, 4:12, 76:84] = torch.randn(3, 8, 8)
    z0 = model.source_encoder(rgb).mode()
    velocity = model.velocity(z0, torch.full((2,), 0.3), torch.zeros(2, dtype=torch.bool))
    for left, right in (z0, velocity):
        torch.testing.assert_close(left[..., 36:84], right[..., 56:104], rtol=1e-3, atol=1e-4)
        assert left[..., 56:64].std() > 1e-3
    assert load_config(recipe).depth.augmentation.position == "random"
