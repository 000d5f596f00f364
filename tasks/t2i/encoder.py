"""The text side of text-to-image: features of a prompt, the trunk of the text variational encoder, what z0 is aligned
with.

Features are token ids, read by a small text transformer that is trained with the model (default), or those of a frozen
encoder (CLIP, T5, a Llama-type decoder) by hub id or path. B batch, N tokens, D width.
"""

import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from crossflow.core.config import Section, SourceConfig
from crossflow.core.errors import UserError
from crossflow.core.files import write_json
from crossflow.core.layers import patchify
from crossflow.core.noise import keyed_generator
from crossflow.networks.alignment import token_head
from crossflow.networks.text.frozen_encoder import FrozenTextEncoder, TextEncoderSettings, feature_width
from crossflow.networks.text.tokenizer import CaptionTokenizer, build_tokenizer, load_tokenizer, tokenize
from crossflow.networks.text.trunk import QueryHead, TextTransformer, TextTrunk, smallest_patch
from crossflow.networks.text.variational import TextVariationalSizes, TextVariationalTrunk

FROZEN_FILE = "text_encoder.json"
TOKENIZER = "tokenizer"
FIXED_WIDTH = 64


class TextSettings(Section):
    """How prompts are read: a frozen encoder, or a small transformer trained with the model."""

    encoder: str | None = None
    """Hub id or folder of a frozen text encoder (CLIP, T5, Llama-type); none: a small transformer trained with the
    model.
    """
    subfolder: str = ""
    """Of the encoder inside that repository."""
    max_length: int = Field(77, ge=2)
    """Tokens per prompt; longer prompts are cut."""
    vocab_size: int = Field(4096, ge=300)
    """Largest vocabulary of the tokenizer built from the data (no frozen encoder)."""
    scale: float = Field(1.0, gt=0)
    """Factor on frozen features (10 with T5 in the released models)."""
    layer: int | None = None
    """Hidden state of a frozen encoder to take; none: the last, after its norm."""
    template: str | None = None
    """Text around {prompt}, for Llama-type encoders."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen encoder."""
    pad_id: int | None = Field(None, ge=0)
    """Token that fills up short prompts for a frozen encoder; none: its tokenizer's own. The released FlowTok models
    were trained on features padded with 0, as open_clip does, and read the padding.
    """
    padding: Literal["features", "zero"] = "features"
    """What a model sees of a frozen encoder at padded positions: its features there, as released, or zero. Only
    source.trunk = released and FlowTok look; with zero their feature caches store no padding.
    """
    feature_width: int | None = Field(None, ge=1)
    """Width of the frozen encoder's features, checked when it is loaded; lets the model be built without it."""
    head: Literal["queries", "flatten", "adaptor", "tokens"] = "queries"
    """How tokens become a latent: learned queries; all tokens flattened through one linear map (released, 256 px), or
    through linear maps and convolutions (released, 512 px); each token for itself (FlowTok). The last two belong to
    source.trunk = released.
    """

    def loading(self) -> dict[str, Any]:
        """The frozen encoder by the names of `TextEncoderSettings`; JSON types only."""
        names = ("subfolder", "max_length", "precision", "scale", "layer", "template", "pad_id")
        return {"source": self.encoder} | {name: getattr(self, name) for name in names}

    @property
    def frozen(self) -> bool:
        """Whether the text is read through a frozen encoder."""
        return self.encoder is not None or self.feature_width is not None


class TextSide:
    """Prompts -> features (B, N) ids or (B, N, D), and mask (B, N) bool; with the modules that read them.

    One of `tokenizer` (trained text transformer) and `frozen` is set, or neither: then modules can be built from the
    settings alone, and no text can be read.
    """

    def __init__(
        self,
        settings: TextSettings,
        tokenizer: CaptionTokenizer | None = None,
        frozen: FrozenTextEncoder | None = None,
    ) -> None:
        assert tokenizer is None or frozen is None
        self.settings = settings
        self.tokenizer = tokenizer
        self.frozen = frozen
        if frozen is not None and settings.feature_width not in (None, frozen.width):
            raise UserError(
                f"text.feature_width = {settings.feature_width}, but the features of {settings.encoder!r} are "
                f"{frozen.width} wide. Give the encoder that this model was made for, or, to fine-tune it for another "
                f"one, text.feature_width={frozen.width}."
            )

    @classmethod
    def prepare(cls, settings: TextSettings, captions: Iterable[str]) -> "TextSide":
        """Loads the frozen encoder, or builds a tokenizer from the captions."""
        _need_encoder(settings)
        if settings.encoder is None:
            return cls(settings, build_tokenizer(captions, settings.vocab_size, settings.max_length))
        return cls(settings, frozen=FrozenTextEncoder.load(TextEncoderSettings(**settings.loading())))

    def save(self, folder: Path) -> None:
        """Writes the tokenizer, or the record of the frozen encoder."""
        if self.frozen is not None:
            write_json(folder / FROZEN_FILE, self.frozen.record())
        else:
            assert self.tokenizer is not None, "there is a tokenizer or a frozen encoder"
            self.tokenizer.save_pretrained(folder / TOKENIZER)

    @classmethod
    def load(cls, settings: TextSettings, folder: Path) -> "TextSide":
        """Reads what `save` wrote; a frozen encoder must have the recorded checksum. Where none is recorded (a released
        model, whose encoder may lie anywhere) the settings alone say which it is.
        """
        _need_encoder(settings)
        if settings.encoder is None:
            return cls(settings, load_tokenizer(folder / TOKENIZER))
        path = folder / FROZEN_FILE
        if not path.is_file():
            raise UserError(f"{folder} has no {FROZEN_FILE}, which says what text encoder its model reads.")
        recorded = json.loads(path.read_text(encoding="utf-8"))
        current = settings.loading() if recorded.get("checksum") is None else {"source": settings.encoder}
        return cls(settings, frozen=FrozenTextEncoder.from_record({**recorded, **current}))

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> ids (B, N) and mask (B, N) bool, on the CPU."""
        if self.frozen is not None:
            return self.frozen.tokens(texts)
        assert self.tokenizer is not None, "there is a tokenizer or a frozen encoder"
        return tokenize(self.tokenizer, texts, self.settings.max_length)

    def read(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """`tokens`, on the frozen encoder's device if there is one -> ids or features (B, N, D), and its vectors (B, D)
        of whole texts.
        """
        if self.frozen is None:
            return ids, None
        features, pooled = self.frozen.encode(ids, mask)
        return features * mask[..., None] if self.settings.padding == "zero" else features, pooled

    @property
    def _reads(self) -> dict[str, int]:
        if self.settings.frozen:
            return {"feature_width": self.feature_width}
        return {"vocab_size": self.vocab_size}

    @property
    def feature_width(self) -> int:
        """D of the frozen encoder's features."""
        if self.frozen is not None:
            return self.frozen.width
        if self.settings.feature_width is not None:
            return self.settings.feature_width
        assert self.settings.encoder is not None, "features are those of a frozen encoder"
        return feature_width(self.settings.encoder, self.settings.subfolder)

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer, or the largest it may have."""
        return len(self.tokenizer) if self.tokenizer is not None else self.settings.vocab_size

    def build_trunk(self, config: SourceConfig, latent_shape: tuple[int, ...]) -> nn.Module:
        """features, mask -> (B, 2, *latent)."""
        head = self.settings.head
        if config.trunk == "released":
            if not self.settings.frozen or head == "queries":
                raise UserError(
                    "source.trunk = released reads a frozen encoder (text.encoder) and has the heads flatten, adaptor "
                    f"and tokens; text.head is {head!r}{'' if self.settings.frozen else ', and no encoder is set'}."
                )
            sizes = TextVariationalSizes(
                num_tokens=self.settings.max_length,
                feature_width=self.feature_width,
                width=config.width,
                depth=config.depth,
                hidden=config.hidden,
                heads=config.heads,
                dropout=config.dropout,
            )
            return TextVariationalTrunk(latent_shape, sizes, head)
        if head not in ("queries", "flatten"):
            raise UserError(f"text.head = {head} belongs to source.trunk = released; use queries or flatten.")
        return TextTrunk(latent_shape, self.build_condition_encoder(config), head=head)

    def build_condition_encoder(self, config: SourceConfig) -> TextTransformer:
        """features, mask -> tokens (B, N, config.width): of the trunk, or the condition of the noise baseline."""
        return TextTransformer(
            **self._reads,
            max_length=self.settings.max_length,
            width=config.width,
            depth=config.depth,
            heads=max(1, config.width // 32),
        )

    # -- what z0 is aligned with

    def reconstructed(self, features: Tensor) -> Tensor:
        """What is reconstructed from z0, (B, N, D): the features themselves, or fixed vectors of their ids."""
        return features if self.settings.frozen else fixed_embedding(self.vocab_size, features.device)[features]

    def build_alignment_head(self, num_values: int) -> nn.Module:
        """Vectors of whole texts (B, D), or ids (B, N) -> (B, num_values)."""
        if self.settings.frozen:
            return token_head(self.feature_width, num_values)
        return nn.Sequential(nn.EmbeddingBag(self.vocab_size, 256), token_head(256, num_values))

    def build_token_head(self, latent_shape: tuple[int, ...]) -> nn.Module:
        """Features (B, N, D) -> (B, N, C), what FlowTok aligns z0 with token by token."""
        if not self.settings.frozen or len(latent_shape) != 2:
            raise UserError(
                "loss.encoder_target = tokens aligns token latents (N, C) with the features of a frozen encoder; this "
                f"model has latents {tuple(latent_shape)}{'' if self.settings.frozen else ' and no text.encoder'}. "
                "Use image or text."
            )
        return token_head(self.feature_width, latent_shape[1])

    def build_reconstructor(self, latent_shape: tuple[int, ...]) -> nn.Module:
        """z0 (B, *latent) -> features (B, N, D)."""
        width = self.feature_width if self.settings.frozen else FIXED_WIDTH
        return FeatureDecoder(latent_shape, self.settings.max_length, width)


@functools.lru_cache(maxsize=4)
def fixed_embedding(vocab_size: int, device: torch.device) -> Tensor:
    """(V, 64): a fixed random vector of unit variance per token, so that ids have features that can be
    reconstructed.
    """
    return torch.randn(vocab_size, FIXED_WIDTH, generator=keyed_generator("token features")).to(device)


class FeatureDecoder(nn.Module):
    """z0 (B, C, H, W) or (B, N', C) -> token features (B, N, D): one learned query per token looks at the latent."""

    def __init__(self, latent_shape: tuple[int, ...], num_tokens: int, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.patch = smallest_patch(latent_shape[1], latent_shape[2], 64) if len(latent_shape) == 3 else 0
        channels = latent_shape[0] * self.patch**2 if self.patch else latent_shape[1]
        self.embed = nn.Linear(channels, hidden)
        self.positions = nn.Parameter(torch.randn(math.prod(latent_shape) // channels, hidden) * 0.1)
        self.head = QueryHead((num_tokens, width), hidden, 4, 1)

    def forward(self, z0: Tensor) -> Tensor:
        """z0 (B, *latent) -> (B, N, D)."""
        tokens = self.embed(patchify(z0, self.patch) if self.patch else z0) + self.positions
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return self.head(tokens, mask)[:, 0]


def _need_encoder(settings: TextSettings) -> None:
    if settings.encoder is None and settings.feature_width is not None:
        raise UserError(
            f"This model reads the features ({settings.feature_width} wide) of a frozen text encoder: set text.encoder "
            "to its hub id or folder."
        )
