"""Text autoencoder: captions <-> a latent of the image codec's shape, decoded to all tokens in parallel.

Captioning is a flow from an image to this latent (CrossFlow; its Table 10 gives the share of tokens that come back).
The decoder must read what the flow hits rather than what the encoder wrote, so in training noise is added to the
latent, which is held at mean 0 and variance 1: loss = cross-entropy of all tokens + kl_weight KL.
B batch, N tokens, V vocabulary, C channels, H W height width.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossflow.core.errors import UserError
from crossflow.core.files import read_tensors, write_json, write_tensors
from crossflow.core.noise import keyed_generator
from crossflow.core.source import LOG_VAR_RANGE, Posterior
from crossflow.networks.text.tokenizer import CaptionTokenizer, detokenize, load_tokenizer, tokenize
from crossflow.tasks.caption.layouts import TextAutoencoderConfig, build_layout

logger = logging.getLogger(__name__)

SETTINGS_FILE, WEIGHTS_FILE, TOKENIZER_FOLDER = "text_autoencoder.json", "model.safetensors", "tokenizer"


@dataclass(frozen=True)
class TextReport:
    """How well captions survive: the share of tokens (with `<eos>`, without padding) and of whole captions that come
    back.

    latent_mean, latent_std: over all elements of all captions; spread: standard deviation of an element over
    captions, mean over elements; posterior_std: mean of the posterior's own; noise: standard deviation added before
    decoding.
    """

    token_accuracy: float
    exact_match: float
    latent_mean: float
    latent_std: float
    spread: float
    posterior_std: float
    noise: float
    num_captions: int


@dataclass(frozen=True)
class TextTraining:
    """How a text autoencoder is trained; batches and noise follow from (seed, step) alone."""

    steps: int = 300
    minutes: float | None = None
    """Stop after this time even if steps are left: the result then depends on the machine's speed."""
    batch_size: int = 64
    lr: float = 2e-3
    seed: int = 0
    precision: Literal["no", "bf16"] = "no"
    """bf16: autocast."""


class TextAutoencoder(nn.Module):
    """`encode(texts) -> Posterior` over latents of mean 0 and variance 1, `decode(z) -> texts`.

    tokenizer: as `build_tokenizer` makes it; latent_shape: (C, H, W) or (N', C).
    """

    shift: Tensor  # (*latent); z = (raw - shift) * scale
    scale: Tensor  # (*latent)

    def __init__(
        self,
        tokenizer: CaptionTokenizer,
        latent_shape: tuple[int, ...],
        config: TextAutoencoderConfig | None = None,
    ) -> None:
        super().__init__()
        config = config or TextAutoencoderConfig()
        if len(latent_shape) not in (2, 3):
            raise UserError(f"A text autoencoder makes latents (C, H, W) or (N, C), not {tuple(latent_shape)}.")
        self.tokenizer, self.config, self.latent_shape = tokenizer, config, tuple(latent_shape)
        self.vocab_size = len(tokenizer)
        self.layout: Literal["code", "patches"]
        if config.layout == "auto":
            # A subclass with its own posterior has latents that were not drawn from a code: every patch must be read.
            self.layout = "code" if type(self).posterior is TextAutoencoder.posterior else "patches"
        else:
            self.layout = config.layout
        self.encoder, self.decoder = build_layout(self.layout, self.vocab_size, self.latent_shape, config)
        self.register_buffer("shift", torch.zeros(self.latent_shape))
        self.register_buffer("scale", torch.ones(self.latent_shape))

    def posterior(self, ids: Tensor, mask: Tensor) -> Posterior:
        """ids (B, N) int64, mask (B, N) bool -> posterior over the normalised latent (B, *latent), float32.

        In training the latent is normalised by the statistics of the batch, and the stored ones follow them.
        """
        raw, log_var = self.encoder(ids, mask).float().unbind(1)
        if self.training and len(raw) > 1:
            mean, std = self._statistics(raw)
            with torch.no_grad():
                self.shift.lerp_(mean, 0.05)
                self.scale.lerp_(1 / std, 0.05)
            latent = (raw - mean) / std
        else:
            latent = (raw - self.shift) * self.scale
        return Posterior(latent, log_var.clamp(*LOG_VAR_RANGE))

    def logits(self, z: Tensor) -> Tensor:
        """Latents (B, *latent) -> token logits (B, N, V), all tokens in parallel."""
        return self.decoder(z)

    def loss(self, ids: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars `loss`, `reconstruction`, `kl` and `token_accuracy` of a batch of ids (B, N) and mask (B, N).

        generator: of the sampling and of the noise on the latent (on CPU, so that it is the same on every device).
        """
        posterior = self.posterior(ids, mask)
        noise = self.decoder.noise(2 * len(ids), generator).to(ids.device).unflatten(0, (2, -1))
        level = torch.rand(len(ids), generator=generator).to(ids.device) * self.config.noise
        z = posterior.sample(noise=noise[0]) + level.reshape(-1, *[1] * len(self.latent_shape)) * noise[1]
        logits = self.logits(z).float()
        reconstruction = token_loss(logits, ids, mask, self.config.pad_weight)
        kl = posterior.kl().mean()
        correct = (logits.argmax(-1) == ids) & mask
        return {
            "loss": reconstruction + self.config.kl_weight * kl,
            "reconstruction": reconstruction,
            "kl": kl,
            "token_accuracy": correct.sum() / mask.sum(),
        }

    def encode(self, texts: Sequence[str]) -> Posterior:
        """Texts -> posterior over latents (B, *latent); see `encode_tokens`."""
        return self.encode_tokens(*self.tokenize(texts))

    @torch.no_grad()
    def encode_tokens(self, ids: Tensor, mask: Tensor, chunk: int = 256) -> Posterior:
        """`tokens` on this module's device -> posterior over latents (B, *latent), by the stored statistics and without
        gradient.
        """
        was_training = self.training
        self.eval()
        with torch.autocast(ids.device.type, enabled=False):
            parts = [self.posterior(*part) for part in zip(ids.split(chunk), mask.split(chunk), strict=True)]
        self.train(was_training)
        return Posterior(
            torch.cat([part.mean for part in parts]),
            torch.cat([part.log_var for part in parts if part.log_var is not None]),
        )

    @torch.no_grad()
    def decode(self, z: Tensor, chunk: int = 256) -> list[str]:
        """Latents (B, *latent) -> texts: the likeliest token at every position, up to the first `<eos>` or padding."""
        with torch.autocast(z.device.type, enabled=False):  # rounded logits would turn near ties into other words
            ids = torch.cat([self.logits(part).argmax(-1) for part in z.to(self.shift).split(chunk)])
        return self._texts(ids)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts -> ids (B, N) and mask (B, N) on the CPU."""
        return tokenize(self.tokenizer, texts, self.config.max_length)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`tokens` on this module's device."""
        ids, mask = self.tokens(texts)
        return ids.to(self.shift.device), mask.to(self.shift.device)

    def fit(
        self,
        captions: Sequence[str],
        training: "TextTraining | None" = None,
        progress: Callable[[int, dict[str, float]], None] | None = None,
        log_every: int = 50,
    ) -> None:
        """Trains on captions (AdamW, warm-up, cosine) and measures the statistics of the latent on them. The module
        is in evaluation mode afterwards; `evaluate` it on other captions.

        progress: called every `log_every` steps with the step and its losses. Raises UserError without captions.
        """
        training = training or TextTraining()
        steps, seed = training.steps, training.seed
        if not captions:
            raise UserError("The text autoencoder is trained on captions, and the data holds none.")
        ids, mask = self.tokenize(captions)
        batch_size = min(training.batch_size, len(ids))
        optimizer = torch.optim.AdamW(self.parameters(), lr=training.lr, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(steps))
        device = self.shift.device.type
        autocast = torch.autocast(device, torch.bfloat16) if training.precision == "bf16" else nullcontext()
        start = time.monotonic()
        self.train()
        for step in range(steps):
            rows = batch_rows(len(ids), batch_size, seed, step).to(ids.device)
            with autocast:
                losses = self.loss(ids[rows], mask[rows], keyed_generator("text_autoencoder", seed, step))
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % log_every == 0 or step + 1 == steps:
                values = {name: value.item() for name, value in losses.items()}
                logger.info("text autoencoder, step %d: %s", step + 1, values)
                if progress is not None:
                    progress(step + 1, values)
            if training.minutes is not None and time.monotonic() - start > 60 * training.minutes:
                logger.info("text autoencoder: stopped after %d of %d steps", step + 1, steps)
                break
        self.eval()
        self.measure_statistics(captions)

    @torch.no_grad()
    def measure_statistics(self, captions: Sequence[str], most: int = 2048) -> None:
        """Sets shift and scale such that over (`most` of) the captions the latent has mean 0 and variance 1."""
        self.shift.zero_()
        self.scale.fill_(1)
        raw = self.encode(captions[:most]).mean
        if len(raw) > 1:
            mean, std = self._statistics(raw)
            self.shift.copy_(mean)
            self.scale.copy_(1 / std)

    @torch.no_grad()
    def evaluate(self, captions: Sequence[str], noise: float = 0.0, seed: int = 0) -> TextReport:
        """Encodes captions (the mean), adds the decoder's noise of that standard deviation, decodes and compares."""
        ids, mask = self.tokenize(captions)
        posterior = self.encode_tokens(ids, mask)
        assert posterior.log_var is not None
        generator = keyed_generator("text_autoencoder/evaluate", seed)
        z = posterior.mean + noise * self.decoder.noise(len(ids), generator).to(ids.device)
        decoded = torch.cat([self.logits(part).argmax(-1) for part in z.split(256)])
        same = [a == b for a, b in zip(self._texts(decoded), self._texts(ids), strict=True)]
        return TextReport(
            token_accuracy=((decoded == ids) & mask).sum().item() / mask.sum().item(),
            exact_match=sum(same) / len(same),
            latent_mean=posterior.mean.mean().item(),
            latent_std=posterior.mean.std().item(),
            spread=posterior.mean.std(0, unbiased=False).mean().item(),
            posterior_std=(posterior.log_var / 2).exp().mean().item(),
            noise=noise,
            num_captions=len(captions),
        )

    def save(self, folder: str | Path) -> Path:
        """Writes weights, settings and tokenizer to `folder` (made if need be) and returns it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        write_tensors(folder / WEIGHTS_FILE, self.state_dict())
        write_json(
            folder / SETTINGS_FILE, {"latent_shape": list(self.latent_shape), "config": self.config.model_dump()}
        )
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The autoencoder saved in `folder`, in evaluation mode. Raises UserError when there is none."""
        folder = Path(folder)
        if not (folder / SETTINGS_FILE).is_file():
            raise UserError(f"{str(folder)!r} holds no text autoencoder: there is no {SETTINGS_FILE} in it.")
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
        config = TextAutoencoderConfig.model_validate(settings["config"])
        autoencoder = cls(tokenizer, tuple(settings["latent_shape"]), config)
        autoencoder.load_state_dict(read_tensors(folder / WEIGHTS_FILE))
        return autoencoder.eval()

    def _statistics(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """(B, *latent) -> mean and standard deviation of every element, (*latent) each.

        Patches have one standard deviation in common: a place that few captions are long enough to use would else be
        blown up in those that do.
        """
        variance = raw.var(0, unbiased=False)
        if self.layout == "patches":
            variance = variance.mean().expand_as(variance)
        return raw.mean(0), (variance + 1e-6).sqrt()

    def _texts(self, ids: Tensor) -> list[str]:
        """ids (B, N) -> texts, where padding ends a text like `<eos>`."""
        return detokenize(
            self.tokenizer, torch.where(ids == self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, ids)
        )


def token_loss(logits: Tensor, ids: Tensor, mask: Tensor, pad_weight: float) -> Tensor:
    """Cross-entropy of ids (B, N) under logits (B, N, V), a scalar; what mask (B, N) excludes weighs `pad_weight`."""
    weight = torch.where(mask, 1.0, pad_weight)
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").reshape(ids.shape)
    return (losses * weight).sum() / weight.sum()


def batch_rows(count: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The rows (batch_size,) of step `step`: whole batches of a shuffle per epoch, which follows from (seed, epoch)."""
    per_epoch = count // batch_size
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(count, generator=keyed_generator("text_autoencoder/order", seed, epoch))
    return order[place * batch_size : (place + 1) * batch_size]


def _warm_cosine(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate: up over the first twentieth, then a cosine down to a hundredth."""
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        done = min(1.0, step / max(1, steps))
        return min(1.0, (step + 1) / warm) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

    return factor
