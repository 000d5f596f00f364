"""Losses of captioning besides the flow's; both read the token ids that `batch.alignment` carries. B batch, N
tokens.
"""

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from crossflow.core.batch import Batch
from crossflow.core.source import Posterior
from crossflow.tasks.caption.decoder import TextAutoencoder, token_loss


class TextLoss(nn.Module):
    """The text autoencoder's own loss beside the flow's; reads the token ids that `batch.alignment` carries."""

    def __init__(self, autoencoder: TextAutoencoder, pad: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.pad = pad

    def forward(self, batch: Batch, posterior: Posterior, z0: Tensor) -> Mapping[str, Tensor]:
        """{"text": the loss of the text autoencoder on the batch's captions}, a scalar."""
        assert batch.alignment is not None
        self.autoencoder.train(self.training)
        losses = self.autoencoder.loss(batch.alignment, batch.alignment != self.pad)
        return {"text": losses["loss"]}


class ReadingLoss(nn.Module):
    """weight x cross-entropy of the caption's tokens, read from z0; needs the ids that `batch.alignment` carries."""

    def __init__(self, autoencoder: TextAutoencoder, weight: float) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(autoencoder.decoder).requires_grad_(True)
        self.pad, self.pad_weight = autoencoder.tokenizer.pad_token_id, autoencoder.config.pad_weight
        self.weight = weight

    def forward(self, batch: Batch, posterior: Posterior, z0: Tensor) -> Mapping[str, Tensor]:
        """{"reading": weight x cross-entropy of the batch's captions read from z0 (B, *latent)}, a scalar."""
        ids = batch.alignment
        assert ids is not None
        return {"reading": self.weight * token_loss(self.decoder(z0), ids, ids != self.pad, self.pad_weight)}


class ExtraLosses(nn.ModuleList):
    """Several losses of a task as one."""

    def forward(self, batch: Batch, posterior: Posterior, z0: Tensor) -> Mapping[str, Tensor]:
        """The losses of all members by name, each a scalar."""
        return {name: value for loss in self for name, value in loss(batch, posterior, z0).items()}
