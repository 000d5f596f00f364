"""The objective of text-to-image: z0 is aligned with the picture or with the text, through a learned head that belongs
to the training and not to the generator.
"""

from torch import Tensor

from crossflow.core.errors import UserError
from crossflow.core.objective import Objective


class TextToImageObjective(Objective):
    """`Objective` whose alignment head can be used by the name of what it reads (loss.encoder_target)."""

    def project_image(self, features: Tensor) -> Tensor:
        """Embeddings of a frozen image tower (B, D), or pictures (B, 3, H, W) for the small trained tower, -> z_hat
        (B, values of a latent), flattened channel-major.
        """
        return self._project(features, "image").flatten(1)

    def project_text(self, features: Tensor) -> Tensor:
        """Text features -> z_hat: per token (B, N, D) -> (B, N, C), or per text (B, D) -> (B, values of a latent)."""
        return self._project(features, "text", "tokens")

    def _project(self, features: Tensor, *targets: str) -> Tensor:
        if self.alignment_head is None or self.settings.encoder_target not in targets:
            raise UserError(
                f"This model has no head for {targets[0]} features: its encoder loss is {self.encoder_loss} with "
                f"loss.encoder_target = {self.settings.encoder_target}."
            )
        return self.alignment_head(features)
