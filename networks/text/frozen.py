"""Frozen text encoders: texts -> features (B, N, D) and mask, by hub id or local folder through transformers.

Three families, told apart by the network's own `config.model_type`: CLIP text towers (last hidden state after the final
norm), T5 encoders, and decoders of the Llama type (hidden states of a layer). B batch, N tokens, D width.
"""

import html
import logging
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import unquote_plus

import torch
from torch import Tensor, nn

from crossflow.core.errors import UserError, unknown_name
from crossflow.networks.frozen import expect_checksum, load_frozen, load_public, weights_checksum
from crossflow.networks.text.tokenizer import tokenize

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


class TextFeatures(nn.Module):
    """A frozen encoder with its tokenizer: `features, mask = encoder(["a red cube"])`. Make one by `TextFeatures.load`.

    family: clip | t5 | decoder; width: D; max_length: N, texts are padded to it and longer ones cut, with a logged
    note; checksum: SHA-256 of the weights; `settings()` is what a run records and `load(**settings)` gives back.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Any,
        *,
        max_length: int = 77,
        scale: float = 1.0,
        layer: int | None = None,
        template: str | None = None,
        clean: bool | None = None,
        pad_id: int | None = None,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        config: Any = network.config
        self.family = _family(config.model_type)
        self.width = int(config.d_model if self.family == "t5" else _text_config(config).hidden_size)
        num_layers = int(_text_config(config).num_hidden_layers)
        if layer is not None and not -num_layers - 1 <= layer <= num_layers:
            raise UserError(
                f"The text encoder has hidden states 0 (embeddings) to {num_layers}; there is no layer {layer}."
            )
        if template is not None and "{prompt}" not in template:
            raise UserError(
                f"The prompt template {template!r} does not say where the text goes: write {{prompt}} in it."
            )
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = _padding_tokenizer(tokenizer)
        self.max_length = max_length
        self.scale = scale
        self.layer = layer
        self.template = template
        self.clean = self.family == "t5" if clean is None else clean
        self.pad_id = pad_id
        self.chunk = chunk
        self.checksum = weights_checksum(network)
        self.source = ""
        self.tokenizer_source = ""
        self.subfolder = ""
        self.precision = str(next(network.parameters()).dtype).removeprefix("torch.")

    @classmethod
    def load(
        cls,
        source: str,
        *,
        subfolder: str = "",
        tokenizer: str = "",
        max_length: int = 77,
        precision: Precision = "float32",
        scale: float = 1.0,
        layer: int | None = None,
        template: str | None = None,
        clean: bool | None = None,
        pad_id: int | None = None,
        chunk: int = 64,
        checksum: str | None = None,
    ) -> Self:
        """The encoder at `source`, a hub id or folder.

        subfolder: of the network in it; tokenizer: where its tokenizer lies if elsewhere; precision: of weights and
        computation (features are float32 always); scale: factor on the features (10 with T5 in the released models);
        layer: hidden state to take, none = the last after its norm; template: text around "{prompt}"; clean: apply
        `clean_text`, none = for T5 only, as released; pad_id: token that fills short texts up, none = the tokenizer's
        own; chunk: texts at once; checksum: SHA-256 the weights must have.
        Raises UserError when it cannot be had, is not one of the families, or its weights are missing or not the same.
        """
        import transformers

        if Path(source).expanduser().is_dir():
            source = str(Path(source).expanduser().resolve())
        where = {"subfolder": subfolder} if subfolder else {}
        # An unknown type of network is refused before its weights are fetched.
        config = load_public(transformers.AutoConfig.from_pretrained, source, files=FILES, **where)
        _family(config.model_type)
        load = _network_class(config.model_type).from_pretrained
        network = load_frozen(load, source, files=FILES, subfolder=subfolder, dtype=getattr(torch, precision))
        words = load_public(
            transformers.AutoTokenizer.from_pretrained, tokenizer or source, files=FILES, **({} if tokenizer else where)
        )
        encoder = cls(
            network,
            words,
            max_length=max_length,
            scale=scale,
            layer=layer,
            template=template,
            clean=clean,
            pad_id=pad_id,
            chunk=chunk,
        )
        expect_checksum(source, encoder.checksum, checksum)
        encoder.source, encoder.tokenizer_source, encoder.subfolder = source, tokenizer, subfolder
        logger.info("text encoder %s (%s): weights sha256 %s", source, encoder.family, encoder.checksum)
        return encoder

    def settings(self) -> dict[str, Any]:
        """What `load` needs to give the same encoder, checksum included; JSON types only."""
        return {
            "source": self.source,
            "subfolder": self.subfolder,
            "tokenizer": self.tokenizer_source,
            "max_length": self.max_length,
            "precision": self.precision,
            "scale": self.scale,
            "layer": self.layer,
            "template": self.template,
            "clean": self.clean,
            "pad_id": self.pad_id,
            "chunk": self.chunk,
            "checksum": self.checksum,
        }

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> features (B, N, D) float32 and mask (B, N) bool, True = token, on the network's device."""
        features, mask, _ = self._encode(texts)
        return features, mask

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """One vector per text (B, D) float32, a target for alignment: CLIP's state at the end token, else the mean
        over tokens.
        """
        features, mask, pooled = self._encode(texts)
        if pooled is not None:
            return pooled
        weight = mask[..., None].float()
        return (features * weight).sum(1) / weight.sum(1).clamp(min=1)

    def train(self, mode: bool = True) -> Self:
        """Does nothing but keep evaluation mode: the encoder is frozen."""
        return super().train(False)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts, cleaned and laid into the template -> ids (B, N) int64 and mask (B, N) bool, True = token."""
        if self.clean:
            texts = [clean_text(text) for text in texts]
        if self.template is not None:
            texts = [self.template.replace("{prompt}", text) for text in texts]
        ids, mask = tokenize(self.tokenizer, texts, self.max_length)
        return ids if self.pad_id is None else torch.where(mask, ids, self.pad_id), mask

    @torch.no_grad()
    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        assert len(texts) > 0, "no texts to encode"
        ids, mask = self.tokens(texts)
        device = next(self.network.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        features, pooled = [], []
        for some_ids, some_mask in zip(ids.split(self.chunk), mask.split(self.chunk), strict=True):
            # The released models give CLIP no mask; it is causal, so this concerns the features of the padding only.
            attention = {} if self.family == "clip" else {"attention_mask": some_mask.long()}
            with torch.autocast(device.type, enabled=False):
                out = self.network(input_ids=some_ids, output_hidden_states=self.layer is not None, **attention)
            hidden = out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]
            features.append(hidden.float() * self.scale)
            if self.family == "clip":
                pooled.append(out.pooler_output.float())
        return torch.cat(features), mask, torch.cat(pooled) if pooled else None


def _family(model_type: str) -> str:
    if model_type not in FAMILIES:
        raise unknown_name("type of text encoder", model_type, FAMILIES)
    return FAMILIES[model_type]


def _network_class(model_type: str) -> Any:
    """The class that runs the text encoder alone; `model_type` is of a known family."""
    import transformers

    special = {
        "clip": transformers.CLIPTextModel,
        "clip_text_model": transformers.CLIPTextModel,
        "t5": transformers.T5EncoderModel,
        "mt5": transformers.MT5EncoderModel,
        "umt5": transformers.UMT5EncoderModel,
    }
    return special.get(model_type, transformers.AutoModel)


def _text_config(config: Any) -> Any:
    return config.text_config if config.model_type == "clip" else config


def _padding_tokenizer(tokenizer: Any) -> Any:
    """`tokenizer`, padding at the right; decoders were trained without padding and get their end token for it."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError("The tokenizer of this text encoder has neither a padding nor an end token to pad with.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_ADDRESS = r"\b((?:%s:(?:/{1,3}|[a-z0-9%%])|[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)))"
_MARKUP = [
    ("<person>", "person"),
    (_ADDRESS % "https?", ""),
    (_ADDRESS % "www", ""),
    (r"<!--.*?-->|</?[a-z!][^>]*>", ""),
]
_CHARACTERS = [
    (r"@\w+\b", ""),
    (r"[\u31c0-\u4dff\u4e00-\u9fff]", ""),  # Chinese characters, which the encoder was not trained on
    (
        r"[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63"
        r"\uff0d]+",
        "-",
    ),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
]
_CLUTTER = [
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),  # article numbers
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.({_FILE_TYPES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_ADVERTISING = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # product codes
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(for|on)\s\w+", ""),
    (rf"\b({_FILE_TYPES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes such as 1920x1080
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
]
_ENDS = [  # spaces at the ends are still there, and hide what stands before them from these, until the second time
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]


def clean_text(text: str) -> str:
    """The cleaning that the released T5 models were trained with, applied twice as there: lower case, without
    addresses, file names, markup, product codes and advertising, with plain quotes and dashes. The rules and their
    order are the release's, also where they cut into words: "lighting.concept art" loses what looks like an address.

    Where the release repairs wrongly decoded text with a library of its own (ftfy), this composes characters (NFC),
    and markup is cut out without being parsed: the same for ordinary captions.
    """
    return _clean_once(_clean_once(text))


def _clean_once(text: str) -> str:
    text = html.unescape(_replace(unquote_plus(text).strip().lower(), _MARKUP))
    text = _replace(text, _CHARACTERS + _CLUTTER)
    if len(re.findall(r"[-_]", text)) > 3:  # a-file-name-like-this
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text))).strip()
    return _replace(text, _ADVERTISING + _ENDS).strip()


def _replace(text: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text
