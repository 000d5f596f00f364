"""Frozen text encoders: texts -> features (B, N, D) and mask, by hub id or local folder through transformers.

Three families, recognised by the network's own `config.model_type`: CLIP text towers (last hidden state after the final
norm), T5 encoders, and decoders of the Llama type (hidden states of a layer). B batch, N tokens, D width.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from torch import Tensor

from crossflow.core.errors import UserError, unknown_name
from crossflow.networks.frozen import Frozen, expect_checksum, freeze, load_frozen, load_public, weights_checksum
from crossflow.networks.text.cleaning import clean_text
from crossflow.networks.text.tokenizer import encodable, report_cut

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Precision = Literal["float32", "bfloat16", "float16"]
FILES = "config.json, model.safetensors and the tokenizer's files"
_CLIP = ("clip", "clip_text_model")
_T5 = ("t5", "mt5", "umt5")
_DECODERS = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
FAMILIES = {name: family for family, names in (("clip", _CLIP), ("t5", _T5), ("decoder", _DECODERS)) for name in names}


@dataclass(frozen=True)
class TextEncoderSettings:
    """Which frozen text encoder, and how texts pass through it. Raises UserError for an invalid template."""

    source: str = ""
    """Hub id or folder of the network."""
    subfolder: str = ""
    """Folder of the network inside `source`."""
    tokenizer: str = ""
    """Hub id or folder of the tokenizer; empty: beside the network."""
    max_length: int = 77
    """N: shorter texts are padded to it, longer ones are cut and a note is logged."""
    precision: Precision = "float32"
    """Of weights and computation; features are always float32."""
    scale: float = 1.0
    """Factor on the features (10 with T5 in the released models)."""
    layer: int | None = None
    """Hidden state to take, 0 (embeddings) to the number of layers; None: the last, after its norm."""
    template: str | None = None
    """Text around "{prompt}"."""
    clean: bool | None = None
    """Whether texts pass through `clean_text`; None: for T5 only, as released."""
    pad_id: int | None = None
    """Token that fills up short texts; None: the tokenizer's own."""
    chunk: int = 64
    """Maximum number of texts that pass through the network at once."""

    def __post_init__(self) -> None:
        if self.template is not None and "{prompt}" not in self.template:
            raise UserError(f"A prompt template must contain {{prompt}} where the text goes, got {self.template!r}.")


class FrozenTextEncoder(Frozen):
    """A frozen text encoder with its tokenizer. Load one by `FrozenTextEncoder.load`.

        encoder = FrozenTextEncoder.load(TextEncoderSettings("openai/clip-vit-large-patch14"))
        features, mask = encoder(["a red cube"])  # (1, 77, 768), (1, 77)

    network: a text network of transformers; tokenizer: its tokenizer; settings: how texts pass through them.
    family: clip | t5 | decoder; width: D; checksum: SHA-256 of the weights; `record()` is what a run stores, and
    `from_record` restores the same encoder from it. Raises UserError for a layer that the network does not have.
    """

    def __init__(
        self,
        network: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        settings: TextEncoderSettings | None = None,
    ) -> None:
        super().__init__()
        settings = settings or TextEncoderSettings()
        config = network.config
        self.family = _family(config.model_type)
        self.width = _width(config)
        num_layers = int(_text_config(config).num_hidden_layers)
        if settings.layer is not None and not -num_layers - 1 <= settings.layer <= num_layers:
            raise UserError(
                f"The hidden states of this text encoder are 0 (embeddings) to {num_layers}; got layer "
                f"{settings.layer}."
            )
        self.network = freeze(network)
        self.tokenizer = _padding_tokenizer(tokenizer)
        self.checksum = weights_checksum(network)
        self.settings = replace(
            settings,
            clean=self.family == "t5" if settings.clean is None else settings.clean,
            precision=cast(Precision, str(next(network.parameters()).dtype).removeprefix("torch.")),
        )

    @classmethod
    def load(cls, settings: TextEncoderSettings, checksum: str | None = None) -> Self:
        """The encoder at `settings.source`. checksum: SHA-256 that the weights must have, None accepts any.

        Raises UserError when it is unavailable, of an unknown family, incomplete, or its weights differ.
        """
        import transformers

        source = _resolved(settings.source)
        subfolder = {"subfolder": settings.subfolder} if settings.subfolder else {}
        config = _config(source, settings.subfolder)  # rejects an unknown type before weights are downloaded
        load = _network_class(config.model_type).from_pretrained
        dtype = getattr(torch, settings.precision)
        network = load_frozen(load, source, files=FILES, subfolder=settings.subfolder, dtype=dtype)
        load_tokenizer = transformers.AutoTokenizer.from_pretrained
        if settings.tokenizer:
            tokenizer = load_public(load_tokenizer, settings.tokenizer, files=FILES)
        else:
            tokenizer = load_public(load_tokenizer, source, files=FILES, **subfolder)
        encoder = cls(network, tokenizer, replace(settings, source=source))
        expect_checksum(source, encoder.checksum, checksum)
        logger.info("text encoder %s (%s): weights sha256 %s", source, encoder.family, encoder.checksum)
        return encoder

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """The encoder that `record` describes, see `record()`. Raises UserError as `load` does."""
        settings = {name: value for name, value in record.items() if name != "checksum"}
        return cls.load(TextEncoderSettings(**settings), record.get("checksum"))

    def record(self) -> dict[str, Any]:
        """The settings and the checksum of the weights, from which `from_record` restores the encoder; JSON types."""
        return asdict(self.settings) | {"checksum": self.checksum}

    @property
    def max_length(self) -> int:
        """N, the number of tokens of every text."""
        return self.settings.max_length

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> features (B, N, D) float32 and mask (B, N) bool, True = token, on the network's device."""
        ids, mask = self._placed(texts)
        return self.encode(ids, mask)[0], mask

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """One vector per text (B, D) float32; see `encode`."""
        return self.encode(*self._placed(texts))[1]

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts, cleaned and put into the template -> ids (B, N) int64 and mask (B, N) bool, True = token."""
        if self.settings.clean:
            texts = [clean_text(text) for text in texts]
        template = self.settings.template
        if template is not None:
            texts = [template.replace("{prompt}", text) for text in texts]
        length = self.settings.max_length
        rows = self.tokenizer(
            [encodable(text) for text in texts],
            truncation=True,
            padding="max_length",
            max_length=length,
            return_attention_mask=True,
        )
        report_cut(self.tokenizer, sum(bool(row.overflowing) for row in rows.encodings or ()), len(texts), length)
        ids = torch.tensor(rows["input_ids"], dtype=torch.int64).reshape(len(texts), length)
        mask = torch.tensor(rows["attention_mask"], dtype=torch.bool).reshape(len(texts), length)
        pad_id = self.settings.pad_id
        return ids if pad_id is None else torch.where(mask, ids, pad_id), mask

    def _placed(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`tokens` on the network's device."""
        assert len(texts) > 0, "no texts to encode"
        ids, mask = self.tokens(texts)
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def encode(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`tokens` on the network's device -> features (B, N, D) float32, and one vector per text (B, D) float32.

        The vector, a target of alignment, is CLIP's state at the end token, otherwise the mean over tokens.
        """
        layer, features, pooled = self.settings.layer, [], []
        for part, part_mask in zip(*(x.split(self.settings.chunk) for x in (ids, mask)), strict=True):
            # The released models give CLIP no mask; it is causal, so only the features of padding depend on it.
            attention = {} if self.family == "clip" else {"attention_mask": part_mask.long()}
            with torch.autocast(ids.device.type, enabled=False):
                out = self.network(input_ids=part, output_hidden_states=layer is not None, **attention)
            hidden = out.last_hidden_state if layer is None else out.hidden_states[layer]
            features.append(hidden.float() * self.settings.scale)
            if self.family == "clip":
                pooled.append(out.pooler_output.float())
        tokens = torch.cat(features)
        if pooled:
            return tokens, torch.cat(pooled)
        weight = mask[..., None].float()
        return tokens, (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


@functools.lru_cache(maxsize=8)
def feature_width(source: str, subfolder: str = "") -> int:
    """D of a frozen text encoder, from its configuration alone. Raises UserError as `FrozenTextEncoder.load`."""
    return _width(_config(_resolved(source), subfolder))


def _resolved(source: str) -> str:
    """A hub id as it is; a folder by its whole path."""
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else source


def _config(source: str, subfolder: str) -> "PretrainedConfig":
    """The configuration of a network of a known family."""
    import transformers

    inside = {"subfolder": subfolder} if subfolder else {}
    config = load_public(transformers.AutoConfig.from_pretrained, source, files=FILES, **inside)
    _family(config.model_type)
    return config


def _width(config: "PretrainedConfig") -> int:
    return int(config.d_model if _family(config.model_type) == "t5" else _text_config(config).hidden_size)


def _family(model_type: str) -> str:
    if model_type not in FAMILIES:
        raise unknown_name("type of text encoder", model_type, FAMILIES)
    return FAMILIES[model_type]


def _network_class(model_type: str) -> Any:
    """The transformers class of the text encoder alone, for a `model_type` of a known family."""
    import transformers

    special = {
        "clip": transformers.CLIPTextModel,
        "clip_text_model": transformers.CLIPTextModel,
        "t5": transformers.T5EncoderModel,
        "mt5": transformers.MT5EncoderModel,
        "umt5": transformers.UMT5EncoderModel,
    }
    return special.get(model_type, transformers.AutoModel)


def _text_config(config: "PretrainedConfig") -> Any:
    return config.text_config if config.model_type == "clip" else config


def _padding_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """`tokenizer` with padding on the right; decoders were trained without padding, so their end token is used."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(
                "The tokenizer of this text encoder has neither a padding nor an end token, so texts cannot be padded."
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer
