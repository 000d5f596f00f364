"""Small files of weights restore them as far as they say."""

from pathlib import Path

import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.core.files import write_tensors
from crossflow.core.storage import packed, read_weights, weight_shapes


def test_small_files_restore_their_weights(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "matrix": torch.randn(6, 40, generator=generator) * torch.logspace(-2, 2, 6)[:, None],
        "kernel": torch.randn(3, 2, 3, 3, generator=generator),
        "silent": torch.zeros(2, 5),
        "bias": torch.randn(7, generator=generator),
        "count": torch.tensor(3),
    }
    sizes = []
    for storage, bound in {"float32": 0.0, "half": 2**-11, "int8": 0.5 / 127}.items():
        path = write_tensors(tmp_path / storage, packed(state, storage))
        sizes.append(path.stat().st_size)
        restored = read_weights(path)
        assert restored.keys() == state.keys()
        assert weight_shapes(path).keys() == state.keys()
        for name, tensor in state.items():
            assert (restored[name].dtype, restored[name].shape) == (tensor.dtype, tensor.shape)
            rows = (lambda values: values.flatten(1) if values.ndim > 1 else values.reshape(-1, 1))(tensor.float())
            error = (restored[name].float().reshape(rows.shape) - rows).abs()
            assert (error <= bound * 1.001 * rows.abs().amax(1, keepdim=True) + 1e-7).all(), (storage, name)
        again = packed(restored, storage)  # what was stored is stored alike again
        assert all(
            torch.allclose(tensor.float(), again[name].float()) for name, tensor in packed(state, storage).items()
        )
    assert sizes[0] > sizes[1] > sizes[2]
    with pytest.raises(UserError, match="half"):
        packed(state, "hlaf")
