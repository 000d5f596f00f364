"""The training objective L = L_FM + w L_Enc + lambda L_KL (CrossFlow eq. 4), with the learned parts of its losses.

The wrapped module's forward returns the losses, so that data-parallel training sees every parameter. The learned parts
(alignment head, temperature, reconstruction decoder) are used in training only and saved separately from the generator.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from crossflow.core import interval, losses
from crossflow.core.batch import Batch
from crossflow.core.config import Config, LossConfig
from crossflow.core.distributed import world_size
from crossflow.core.errors import UserError
from crossflow.core.guidance import draw_unconditional, rotate_targets
from crossflow.core.model import CrossFlow
from crossflow.core.noise import Noise
from crossflow.core.paths import PATHS, PathPoint, TrainingTimes, bridge, expand
from crossflow.core.sampling import generate
from crossflow.core.source import Posterior

MAX_LOGIT_SCALE = 100.0
"""The largest factor on contrastive similarities, as in CLIP."""
ExtraLosses = Callable[[Batch, Posterior, Tensor], Mapping[str, Tensor]]


class Objective(nn.Module):
    """`Objective(batch, noise) -> {"loss": ..., "flow": ..., "kl": ..., "encoder": ...}`, scalars.

    alignment_head: module alignment (B, ...) -> (B, values of a latent), z_hat of the contrastive losses;
    reconstructor: module z0 (B, *latent) -> the shape of `batch.alignment`, for the reconstruction loss;
    extra_losses: the task's own losses by name, from (batch, posterior, z0), added with weight 1;
    decoded_loss: module (z1 (B, *latent), batch) -> (B,), the loss `loss.decoded` of finished outputs.
    The flow loss of a backbone that returns several velocities is their multi-resolution loss.
    """

    def __init__(
        self,
        model: CrossFlow,
        config: Config,
        *,
        alignment_head: nn.Module | None = None,
        reconstructor: nn.Module | None = None,
        extra_losses: ExtraLosses | None = None,
        decoded_loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.path = PATHS.get(config.path.name)(sigma_min=config.path.sigma_min)
        self.path_noise = config.path.noise
        self.times = TrainingTimes(config.time)
        self.settings: LossConfig = config.loss
        losses.KL_FORMS.get(config.loss.kl)
        self.drop = config.guidance.drop
        self.interval = config.interval
        self._teacher: tuple[CrossFlow, ...] = ()
        self.extra_losses = extra_losses
        self.crosses = config.source.kind != "gaussian"
        # A Gaussian source does not depend on the features, so there is nothing to align.
        self.encoder_loss = config.loss.encoder if self.crosses else "none"
        self._decoded = () if decoded_loss is None else (decoded_loss,)
        self.computes_flow = config.loss.flow_weight > 0 or bool(self._decoded)
        if config.loss.decoded != "none" and decoded_loss is None:
            raise UserError(f"loss.decoded = {config.loss.decoded} is no loss of this task; use none.")
        own_losses = config.loss.direction_weight + config.loss.mean_weight
        if not self.computes_flow and self.encoder_loss == "none" and own_losses == 0:
            raise UserError(
                "loss.flow_weight=0 trains the source encoder alone, by its own losses: set loss.encoder to "
                "contrastive, sigmoid or reconstruction, or loss.mean_weight or loss.direction_weight above 0, and "
                "source.kind to a kind other than gaussian."
            )
        is_left = config.loss.encoder_gradient == "none" and not config.source.frozen
        if is_left and self.encoder_loss == "none" and own_losses == 0 and not extra_losses:
            raise UserError(
                "loss.encoder_gradient=none leaves the source encoder to its own losses, and there are none: set "
                "loss.mean_weight, loss.direction_weight or loss.encoder, or freeze a trained encoder "
                "(source.frozen=true)."
            )
        self.alignment_head = alignment_head if self.encoder_loss in ("contrastive", "sigmoid") else None
        self.reconstructor = reconstructor if self.encoder_loss == "reconstruction" else None
        if self.encoder_loss in ("contrastive", "sigmoid"):
            if alignment_head is None:
                raise UserError(
                    f"loss.encoder = {self.encoder_loss} needs an alignment head, which this task lacks; use none."
                )
            self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / config.loss.temperature)))
        if self.encoder_loss == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(-10.0))
        if self.encoder_loss == "reconstruction" and reconstructor is None:
            raise UserError("loss.encoder = reconstruction needs a decoder, which this task lacks; use none.")

    def teach(self, teacher: CrossFlow) -> None:
        """Sets the model whose velocities a flow map learns (in a tuple, so that it does not become a submodule)."""
        self._teacher = (teacher.eval().requires_grad_(False),)

    @property
    def companions(self) -> tuple[nn.Module, ...]:
        """Modules that the objective uses and that are none of its own: neither trained, nor moved or saved with it."""
        return (*self._teacher, *self._decoded)

    @property
    def teacher(self) -> CrossFlow:
        """The model set by `teach`."""
        assert self._teacher, "interval.teacher is set, but no teacher was loaded"
        return self._teacher[0]

    @property
    def leaves_parameters_out(self) -> bool:
        """Whether some trainable parameters get no gradient: without a flow loss those of the backbone, without its
        gradient perhaps some of the source encoder.
        """
        return not self.computes_flow or self.settings.encoder_gradient == "none"

    def encoder_term(self, batch: Batch, z0: Tensor) -> Tensor | None:
        """L_Enc of the sampled z0 (B, *latent) against `batch.alignment`; None without an encoder loss."""
        if self.encoder_loss == "none":
            return None
        assert batch.alignment is not None, "the encoder loss needs a batch with an alignment"
        if self.reconstructor is not None:
            return losses.reconstruction_loss(self.reconstructor(z0), batch.alignment, batch.mask)
        assert self.alignment_head is not None
        target = self.alignment_head(batch.alignment)
        if self.encoder_loss == "sigmoid":
            return losses.sigmoid_contrastive_loss(z0, target, self.log_temperature, self.bias)
        return losses.clip_contrastive_loss(z0, target, self.log_temperature)

    @torch.no_grad()
    def _limit_temperature(self) -> None:
        """Clamps the parameter itself: clamping in the graph would leave it without a gradient beyond the bound."""
        if self.encoder_loss in ("contrastive", "sigmoid"):
            self.log_temperature.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def _coefficients(self, num_stages: int) -> list[float]:
        coefficients = self.settings.coefficients
        if coefficients and len(coefficients) != num_stages:
            raise UserError(
                f"loss.coefficients has {len(coefficients)} values, but the backbone returns {num_stages} velocities."
            )
        return list(coefficients) or losses.stage_coefficients(num_stages)

    def forward(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """The losses of a batch by name, scalars; "loss" is their weighted sum."""
        self._limit_temperature()
        if batch.unconditional is None:
            (batch,) = self.draw([batch], [noise])
        posterior = self.model.source_encoder(batch.features, batch.mask)
        z0 = posterior.sample(noise=noise.source)
        parts: dict[str, Tensor] = {}
        loss = z0.new_zeros(())
        if self.computes_flow:
            parts |= self._flow_losses(batch, z0, noise)
            loss = self.settings.flow_weight * parts["flow"]
        if "decoded" in parts:
            loss = loss + self.settings.decoded_weight * parts["decoded"]
        if self.crosses and self.model.source_encoder.kind == "variational":
            kl = posterior.kl(self.settings.kl)
            parts["kl"] = kl.sum() / batch.fraction if self.settings.kl_reduction == "sum" else kl.mean()
            loss = loss + self.settings.kl_weight * parts["kl"]
        encoder = self.encoder_term(batch, z0)
        if encoder is not None:
            parts["encoder"] = encoder
            loss = loss + self.settings.encoder_weight * encoder
        for name, (weight, value) in self._distances(batch, posterior.mean).items():
            parts[name] = value
            loss = loss + weight * value
        if self.extra_losses is not None:
            for name, value in self.extra_losses(batch, posterior, z0).items():
                parts[name] = value
                loss = loss + value
        return {"loss": loss, **parts}

    def _distances(self, batch: Batch, mean: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Name -> (weight, scalar): how far the mean of the source posterior (B, *latent) is from the target.

        Unconditional samples, whose targets are those of others, count 0.
        """
        settings, distances = self.settings, {}
        assert batch.unconditional is not None
        own = (~batch.unconditional).float()
        if settings.direction_weight > 0:
            turned = losses.direction_loss(mean, batch.target, batch.weight, whole=settings.direction == "sample")
            distances["direction"] = (settings.direction_weight, (own * turned).mean())
        if settings.mean_weight > 0:
            squares = losses.flow_matching_loss(mean, batch.target, batch.weight)
            distances["mean"] = (settings.mean_weight, (own * squares).mean())
        return distances

    def draw(self, batches: Sequence[Batch], noises: Sequence[Noise]) -> list[Batch]:
        """The batches with their unconditional samples drawn and targets and weights rotated among these.

        The batches are all parts of one process's share of an optimizer step, and every process must call it. The draw
        is over the whole step, so it does not depend on the division into parts and processes.
        """
        fraction = 1 / (len(batches) * world_size())
        targets, weights = [batch.target for batch in batches], [batch.weight for batch in batches]
        if self.crosses:
            unconditional = draw_unconditional([noise.drop for noise in noises], self.drop)
            targets = rotate_targets(targets, unconditional)
            present = [weight for weight in weights if weight is not None]
            weights = [*rotate_targets(present, unconditional)] if present else weights
        else:  # the condition is dropped and the target stays, even for a single drawn sample
            unconditional = [noise.drop < self.drop for noise in noises]
        return [
            replace(batch, target=target, weight=weight, unconditional=flags, fraction=fraction)
            for batch, target, weight, flags in zip(batches, targets, weights, unconditional, strict=True)
        ]

    def _teaching(self, z0: Tensor, t: Tensor, is_diagonal: Tensor) -> Tensor:
        """z0 (B, *latent) without its gradient for the samples by which the flow does not teach the source encoder.

        is_diagonal: (B,) bool, where s = t. Elsewhere the target of a flow map is no function of the source, so that
        its gradient misleads the encoder.
        """
        rule = self.settings.encoder_gradient
        if rule == "everywhere":
            return z0
        if rule == "none":
            return z0.detach()
        rows = is_diagonal & (t == 0) if rule == "start" else is_diagonal
        return torch.where(expand(rows, z0), z0, z0.detach())

    def _point(self, z0: Tensor, target: Tensor, t: Tensor, noise: Noise) -> PathPoint:
        """The point of the path at which the velocity is learned, and that velocity."""
        point = self.path(z0, target, t)
        if self.path_noise > 0:
            point = bridge(point, noise.source, self.path_noise)  # which a deterministic source leaves unused
        if self.settings.encoder_gradient == "target_detached":
            return replace(point, velocity=point.velocity.detach())
        return point

    def _flow_losses(self, batch: Batch, z0: Tensor, noise: Noise) -> dict[str, Tensor]:
        """{"flow": L_FM at the noise's times}, of a flow map the loss of its jumps; and "decoded". Scalars."""
        if self.interval.is_map:
            return {"flow": self._jump_loss(batch, z0, noise)}
        t = self.times(noise.time)
        target = self._straightened(batch, z0) if self.interval.target == "reflow" else batch.target
        point = self._point(self._teaching(z0, t, torch.ones_like(t, dtype=torch.bool)), target, t, noise)
        condition = self.model.encode_condition(batch.condition)
        assert batch.unconditional is not None
        velocities = self.model.velocities(point.z_t, t, batch.unconditional, condition)
        coefficients = self._coefficients(len(velocities))
        parts = {"flow": losses.multi_resolution_loss(velocities, point.velocity, coefficients, batch.weight).mean()}
        for decoded_loss in self._decoded:
            end = self.path.end(replace(point, velocity=velocities[-1].float()))
            # Unconditional samples have the targets of others, of which a step can only reach the mean.
            parts["decoded"] = (~batch.unconditional * decoded_loss.to(end.device)(end, batch)).mean()
        return parts

    def _jump_loss(self, batch: Batch, z0: Tensor, noise: Noise) -> Tensor:
        """The loss of a flow map, a scalar: where s = t of the velocity, elsewhere of `interval.target_of`."""
        settings, unconditional = self.interval, batch.unconditional
        assert unconditional is not None
        assert noise.jump is not None, "a flow map draws its jumps from the noise"
        jumps = interval.draw_jumps(self.times(noise.time), self.times(noise.jump[:, 0]), noise.jump[:, 1:], settings)
        point = self._point(self._teaching(z0, jumps.t, jumps.is_diagonal), batch.target, jumps.t, noise)
        scale = torch.where(unconditional, torch.ones_like(jumps.scale), jumps.scale)
        condition = self.model.encode_condition(batch.condition)
        average = interval.AverageOf(self.model, unconditional, scale, condition)
        acts = interval.guided_rows(jumps, unconditional, settings.guidance_interval)
        goal = self._velocity_goal(batch, point, average, acts)
        target = interval.target_of(average, point.z_t, goal, jumps, settings)
        averages = target.corrected(average(point.z_t, jumps.t, jumps.s))
        loss = losses.multi_resolution_loss(averages, target.goal, self._coefficients(len(averages)), batch.weight)
        return interval.weighted(loss, settings.power).mean()

    def _velocity_goal(self, batch: Batch, point: PathPoint, average: interval.AverageOf, acts: Tensor) -> Tensor:
        """The velocity (B, *latent) that is to be learned at a point, guided for the samples `acts` (B,) bool.

        A teacher's, or that of the data. Of the latter guidance v_without + w (v - v_without) is built in by its fixed
        point v_data + (1 - 1/w) (v - v_without), both of the network itself.
        """
        t, unconditional = point.t, average.unconditional
        with torch.no_grad():
            z = point.z_t.detach()
            if self.interval.teacher is not None:
                teacher = self.teacher.to(z.device)
                condition = teacher.encode_condition(batch.condition)

                def without(rows: Tensor) -> Tensor:
                    part = None if condition is None else condition[rows]
                    return teacher.velocity(z[rows], t[rows], torch.ones_like(rows, dtype=torch.bool), part)

                velocity = teacher.velocity(z, t, unconditional, condition)
                return interval.guided(velocity, without, average.scale, acts)
            if self.interval.guidance[1] == 1:
                return point.velocity
            with interval.without_dropout(self.model.backbone):
                difference = average(z, t, t)[-1] - average.without_source()(z, t, t)[-1]
            share = torch.where(acts, 1 - 1 / average.scale, torch.zeros_like(average.scale))
        return point.velocity + expand(share, z) * difference

    def _straightened(self, batch: Batch, z0: Tensor) -> Tensor:
        """What the teacher makes of z0 (B, *latent): the targets of a reflow."""
        low, high = self.interval.guidance
        assert low == high, "reflow builds in a single scale"
        return generate(
            self.teacher.to(z0.device), z0.detach(), condition=batch.condition, steps=self.interval.teacher_steps,
            guidance=low, guidance_interval=self.interval.guidance_interval,
        )  # fmt: skip
