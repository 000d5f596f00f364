"""The typed, frozen configuration of a run: one section for each part of the method, a sentence under each setting.

A task subclasses `Config` to add its sections (see tasks/*/__init__.py); settings.py reads and validates.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from crossflow.core.source import SourceKind

Decay = Annotated[float, Field(ge=0, lt=1)]
SMOOTH_TIME_SCALE = 20.0
"""Largest scale of the time embedding at which flow maps are trained by derivatives."""
PathTime = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(Section):
    """The data sets, and the size of the pictures."""

    train: str = "scenes"
    """SPEC of the training data: a format prefix and a path (`crossflow list datasets`)."""
    val: str | None = None
    """SPEC for validation and evaluation; none: that of `train`. Its splits `val` and `test` are used."""
    image_size: int = Field(32, ge=4, le=4096)
    """Side of the square pictures the model sees, in pixels."""
    num_train: int | None = Field(None, ge=1)
    """Maximum number of training items; none: all (scenes: its default number)."""
    num_val: int = Field(256, ge=1)
    """Number of items of each validation and of the scores at the end of training."""
    max_bad: float = Field(0.05, ge=0, le=1)
    """Share of unreadable items above which a run stops."""


class SourceConfig(Section):
    """The source encoder (CrossFlow Table 3)."""

    kind: SourceKind = "variational"
    """variational | deterministic | noisy | gaussian (the noise-source baseline: the features become a condition)."""
    noise_scale: float = Field(1.0, gt=0)
    """Standard deviation of the noise that the `noisy` source adds, in units of the latent."""
    trunk: Literal["small", "released"] = "small"
    """small: the trunk of the task; released: the papers' post-norm text encoder (t2i with a frozen text encoder)."""
    width: int = Field(128, ge=8)
    """Width of the task's trunk: a multiple of 32, or of 4 below 64."""
    depth: int = Field(2, ge=0)
    """Layers of the task's trunk."""
    hidden: int = Field(1024, ge=8)
    """Width inside the feed-forwards of the released trunk."""
    heads: int = Field(8, ge=1)
    """Attention heads of the released trunk."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout probability of the released trunk."""
    frozen: bool = False
    """Keep the encoder of train.start_from unchanged (second of two stages, CrossFlow Table 3)."""
    condition: bool = False
    """The backbone reads the features besides starting from them, as it always does with a gaussian source: by
    cross-attention to text, or a grid beside z_t (CSFM).
    """

    @property
    def conditions(self) -> bool:
        """Whether the backbone reads the features."""
        return self.condition or self.kind == "gaussian"

    @field_validator("width")
    @classmethod
    def _divides_into_heads(cls, width: int) -> int:
        if width % 4 or width % max(1, width // 32):  # the trunks have one head for each 32 values
            raise ValueError("it must be a multiple of 32, or of 4 below 64")
        return width


class StageConfig(Section):
    """One stage of a DiMR backbone; the first (coarsest) has Transformer blocks, the others ConvNeXt blocks."""

    width: int = Field(ge=1)
    hidden: int = Field(ge=1)
    """Width inside the gated feed-forwards."""
    depth: int = Field(ge=1)
    """Number of blocks; an even number is raised by one."""
    heads: int = Field(1, ge=1)
    """Attention heads (first stage only)."""
    patch: int = Field(1, ge=1)
    """Side of the squares of latent values that become one position of the stage."""
    pool: int = Field(1, ge=1)
    """Side of the squares of latent values that are averaged beforehand (1 in the releases)."""


class BackboneConfig(Section):
    """The network of the velocity."""

    name: str = "dit"
    """`crossflow list backbones`."""
    size: str = "tiny"
    """A row of the backbone's size table; `width`, `depth` and `heads` override it."""
    width: int | None = Field(None, ge=8)
    depth: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    patch: int = Field(2, ge=1)
    """Side of the square patches a grid latent is cut into (token latents and dimr: ignored)."""
    positions: Literal["sincos", "rotary", "stored", "none"] = "sincos"
    """Fixed sin-cos positions, for pictures of the training size; rotary ones, which extend to larger pictures (dit on
    grids); the sin-cos table stored with the weights, as released; or none (with `conv`, for pictures of any size).
    """
    conv: int = Field(0, ge=0, le=15)
    """Kernel of a depthwise convolution over the grid of patches in each block; 0: none."""
    time_scale: float = Field(1000.0, gt=0)
    """t in [0, 1] is multiplied by this before its embedding (1 in the released DiT)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    interval: Literal["none", "added", "split"] = "none"
    """How a flow map reads the end s of a jump: by an embedding of s - t that is added to that of t and is zero at
    first (added), or by giving the last third of the blocks (dimr: the last stage) s instead of t (split). Both leave
    the velocities of a trained network as they are.
    """
    guided: bool = False
    """Whether a flow map takes the guidance scale as an input, for a range of `interval.guidance`."""
    num_stages: int = Field(2, ge=1, le=4)
    """dimr: resolutions, each half of the next (2 at 256 px, 3 at 512 px in the papers)."""
    stages: tuple[StageConfig, ...] = ()
    """dimr: the stages one by one, coarse to fine, instead of a row of the size table."""

    @field_validator("conv")
    @classmethod
    def _odd(cls, conv: int) -> int:
        if conv and conv % 2 == 0:
            raise ValueError("the kernel size must be odd, to keep the size of the grid")
        return conv

    @property
    def grain(self) -> int:
        """Height and width of a grid latent must be multiples of this: of the patch and the first stage's reduction."""
        if self.name != "dimr":
            return self.patch
        shrinks = self.stages[0].patch * self.stages[0].pool if self.stages else 2 ** (self.num_stages - 1)
        return math.lcm(self.patch, shrinks)


class PathConfig(Section):
    """The path from z0 to z1."""

    name: str = "linear"
    """linear | sincos."""
    sigma_min: float = Field(1e-5, ge=0, lt=1)
    """s of the linear path."""
    noise: float = Field(0.0, ge=0)
    """sigma of a bridge: points of the path get sigma sqrt(t (1 - t)) eps (LBM; a deterministic source)."""


class TimeConfig(Section):
    """The distribution of the training time t in [0, 1]."""

    law: str = "logit_normal"
    """logit_normal | uniform."""
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0)
    """Resolution shift a of t' = a t / (1 + (a - 1) t)."""
    points: tuple[PathTime, ...] = ()
    """The only training times, each as often as the others, instead of the law: those at which few steps are taken."""
    at_start: float = Field(0.0, ge=0, le=1)
    """Share of the samples at t = 0; the others have times of the law. 1: the flow is learned for one step alone."""


class LossConfig(Section):
    """The losses of eq. 4 and their weights."""

    flow_weight: float = Field(1.0, ge=0)
    """Weight of the flow loss; 0: only the source encoder is trained, and no flow is computed (first of two stages),
    unless there is a loss of decoded end points (end-to-end).
    """
    kl: str = "standard"
    """Form of the regulariser: standard | released | variance."""
    kl_weight: float = Field(1e-4, ge=0)
    """lambda of eq. 4; the regulariser is summed over the latent of a sample."""
    encoder: Literal["none", "contrastive", "sigmoid", "reconstruction"] = "contrastive"
    """The encoder loss L_Enc between z0 and an alignment target of the task."""
    encoder_target: str = "image"
    """What z0 is aligned with, in the task's terms (t2i: image | text | tokens)."""
    encoder_weight: float = Field(1.0, ge=0)
    temperature: float = Field(0.07, gt=0)
    """Initial temperature of the contrastive losses."""
    kl_reduction: Literal["mean", "sum"] = "mean"
    """Reduction over the samples of a batch; sum as in the released FlowTok."""
    encoder_gradient: Literal["diagonal", "everywhere", "target_detached", "start", "none"] = "diagonal"
    """Which gradient of the flow loss trains the source encoder (docs/sources.md). diagonal: of every sample, of a flow
    map those with s = t; everywhere: of its jumps too; target_detached: by z_t and not by the velocity z1 - z0; start:
    of the samples at t = 0 (FlowBind; needs time.at_start); none: the encoder learns from its own losses alone.
    """
    direction_weight: float = Field(0.0, ge=0)
    """Weight of 1 - cos(mean of the source posterior, z1) (CSFM)."""
    direction: Literal["position", "sample"] = "position"
    """What the cosine is taken over: the channels of each position, or the whole latent of a sample."""
    mean_weight: float = Field(0.0, ge=0)
    """Weight of the mean squared distance between the mean of the source posterior and z1. With
    encoder_gradient=none that mean becomes E[z1 | input] (PMRF).
    """
    decoded: Literal["none", "l1", "ssim", "features", "abs_rel", "affine"] = "none"
    """Loss of the decoded end point that a single step from z_t reaches (LBM; docs/one_step.md). Pictures: l1, ssim,
    features (the distance in a network); depth: abs_rel, affine (L1 after the scale and shift of least squares).
    """
    decoded_weight: float = Field(1.0, ge=0)
    decoded_network: str | None = None
    """The network of decoded=features: timm:NAME, timm:NAME=FILE.safetensors, or timm:NAME@random."""
    coefficients: tuple[float, ...] = ()
    """Weights of the flow loss at each resolution, coarse to fine; none: from 1/4 to 1 in equal ratios, as released."""


class GuidanceConfig(Section):
    """The indicator of CrossFlow section 4.3 in training."""

    drop: float = Field(0.1, ge=0, lt=1)
    """Probability that a training sample is unconditional."""


class IntervalConfig(Section):
    """Sampling in few steps: what teaches a flow map its average velocities u(z, t, s) (docs/few_steps.md)."""

    target: Literal["none", "derivative", "composition", "reflow"] = "none"
    """derivative: u = v + (s - t) du/dt (MeanFlow); composition: a jump equals two shorter ones in a row (shortcut,
    alpha-flow); reflow: no flow map, but plain flows from z0 to what the teacher makes of it.
    """
    teacher: str | None = None
    """Run directory, or hub repository, of a model of the same latents whose velocities are learned; none: those of the
    data.
    """
    guidance: tuple[float, float] = (1.0, 1.0)
    """Lowest and highest guidance scale that is built in, drawn evenly in log w; a range needs backbone.guided."""
    guidance_interval: tuple[PathTime, PathTime] = (0.0, 1.0)
    """Times between which the built-in guidance acts."""
    diagonal: float = Field(0.5, ge=0, le=1)
    """Share of the samples with s = t, which learn the velocity itself and alone train the source encoder."""
    aligned: float = Field(0.5, ge=0, le=1)
    """Share of the jumps that are steps of sampling in 1, 2, 4 or 8 steps; the others join two times of the law."""
    both_ways: float = Field(0.0, ge=0, le=1)
    """Share of the jumps that lead backwards, from the target to the source."""
    derivative: Literal["difference", "jvp"] = "difference"
    """How du/dt is computed: by a central difference, or by forward-mode differentiation, which takes more memory."""
    epsilon: float = Field(0.005, gt=0, lt=0.5)
    """Half the distance of the two times of a central difference."""
    first: Literal["own", "velocity"] = "own"
    """composition: the first of the two jumps is the network's own (shortcut) or a straight step (alpha-flow)."""
    alpha: float = Field(0.5, gt=0, lt=1)
    """composition: length of the first jump in units of both."""
    power: float = Field(0.0, ge=0, le=1)
    """Each sample's loss is divided by its own size to this power (1 in MeanFlow); 0: plain mean squares."""
    teacher_steps: int = Field(8, ge=1)
    """reflow: Euler steps of the teacher."""

    @field_validator("guidance", "guidance_interval")
    @classmethod
    def _in_order(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= pair[0] <= pair[1]:
            raise ValueError("the two numbers must be in ascending order, and not negative")
        return pair

    @field_validator("guidance")
    @classmethod
    def _guides(cls, scales: tuple[float, float]) -> tuple[float, float]:
        if scales[0] < 1:
            raise ValueError("scales of built-in guidance start at 1, which is none")
        return scales

    @property
    def is_map(self) -> bool:
        """Whether a flow map is trained."""
        return self.target in ("derivative", "composition")


class FinetuneConfig(Section):
    """A run that stores only what it changes in another run, its base (docs/fine_tuning.md)."""

    base: str | None = None
    """Run directory, or hub repository, that is changed; none: the run stores all of its weights."""
    checksum: str | None = None
    """SHA-256 of the base's weights, which is compared when they are loaded."""
    rank: int = Field(0, ge=0)
    """Rank of the matrices that are added to linear layers (LoRA); 0: none, parameters themselves are trained."""
    alpha: float | None = Field(None, gt=0)
    """alpha / rank scales the added matrices; none: 1."""
    targets: tuple[str, ...] = ()
    """Patterns (*, ?) of the names of linear layers that get such matrices; none: the projections of attention and
    feed-forwards, where most of the weights lie and which adapters of language models gain most from.
    """
    train: tuple[str, ...] = ()
    """Patterns of the names of parameters that are trained themselves; none: with rank 0 all."""
    freeze: tuple[str, ...] = ()
    """Patterns of the names of parameters and layers that stay as they are."""

    @property
    def factor(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank


class TrainConfig(Section):
    """The training loop."""

    steps: int = Field(1000, ge=0)
    """Optimizer steps; 0: only the parts before the flow are learned (a caption decoder for a reversed t2i run)."""
    batch_size: int = Field(64, ge=1)
    """Samples per optimizer step, over all processes and accumulated parts."""
    accumulate: int = Field(1, ge=1)
    """Number of parts into which a process's share of the batch is divided."""
    optimizer: Literal["adamw", "muon", "adamw8bit"] = "adamw"
    """muon: orthogonalised momentum for matrices, with which small models need far fewer steps. adamw8bit: AdamW whose
    averages take two bytes per parameter instead of eight (bitsandbytes).
    """
    lr: float = Field(1e-4, gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: float = Field(0.03, ge=0)
    warmup_steps: int = Field(100, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of a cosine schedule."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    ema: float = Field(0.9999, ge=0, lt=1)
    """Decay of the moving average of the weights, approached as (1 + n) / (10 + n) after n updates."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool | None = None
    """Compile the blocks of the model by torch.compile; none: on a CUDA GPU for which torch can compile."""
    offload: bool = False
    """On a GPU, keep frozen networks in host memory while they do not compute, as pays with cached features."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: each process holds a part of every weight, average and optimizer state, and of each checkpoint; without
    effect in a single process.
    """
    save_every: int = Field(1000, ge=1)
    background_saves: bool = False
    """Write checkpoints while training continues, from a copy in host memory. Those at the end are waited for."""
    keep: int = Field(2, ge=1)
    """Number of checkpoints kept."""
    eval_every: int = Field(1000, ge=0)
    """Steps between validations; 0: only at the end."""
    eval_scores: bool = False
    """Also score the outputs for the `data.num_val` items at each validation."""
    sample_every: int = Field(1000, ge=0)
    """Steps between sample grids; 0: only at the end."""
    log_every: int = Field(20, ge=1)
    num_workers: int | None = Field(None, ge=0)
    """Processes that load data beside each training process; none: chosen by the cores, and 0 for rendered scenes,
    which are made many at once and kept in memory.
    """
    trackers: tuple[str, ...] = ()
    """tensorboard, wandb; metrics.jsonl is always written."""
    start_from: str | None = None
    """Run directory whose averaged weights initialise a new run, where names and shapes agree."""
    parts_from: str | None = None
    """Run directory whose tokenizer, codec and scales a new run takes over instead of learning its own."""
    max_minutes: float | None = Field(None, gt=0)
    """Stop with a checkpoint after this many minutes."""
    max_bad_steps: int = Field(1, ge=1)
    """Stop at this many steps in a row whose loss or gradient is not finite. Such a step changes no weights."""
    grace_seconds: float = Field(30, gt=0)
    """Time from SIGTERM, to any process, to the final checkpoint. A validation and samples are given up, of several
    processes after the current batch; a single process also gives up a step after half of this time.
    """
    timeout_minutes: float = Field(30, gt=0)
    """Limit of the waiting for another process, in anything that they do together."""
    auto_micro_batch: bool = False
    """Halve the samples of a forward pass when memory runs out, and make the same step again (one process). A
    contrastive loss takes its negatives from fewer samples then.
    """


class SampleConfig(Section):
    """How the velocity is integrated."""

    solver: str = "euler"
    """`crossflow list solvers`."""
    steps: int = Field(50, ge=1)
    """Steps of a fixed-step solver."""
    guidance: float = 1.0
    """w of v_uncond + w (v_cond - v_uncond); 1: none."""
    guidance_interval: tuple[PathTime, PathTime] = (0.0, 1.0)
    """Times between which guidance acts, in ascending order, in [0, 1]."""
    zero_init: int = Field(0, ge=0)
    """Number of first steps whose velocity is set to zero."""
    time_grid: Literal["uniform", "released"] = "uniform"
    mode: bool = False
    """Start from the mean of the source posterior instead of a sample."""
    batch_size: int = Field(64, ge=1)

    @field_validator("guidance_interval")
    @classmethod
    def _in_order(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if interval[0] > interval[1]:
            raise ValueError("the times must be in ascending order")
        return interval


class Config(Section):
    """The sections that all tasks share."""

    task: str
    """t2i | caption | depth | sr (`crossflow list tasks`)."""
    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    source: SourceConfig = SourceConfig()
    backbone: BackboneConfig = BackboneConfig()
    path: PathConfig = PathConfig()
    time: TimeConfig = TimeConfig()
    loss: LossConfig = LossConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    interval: IntervalConfig = IntervalConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()

    @model_validator(mode="after")
    def _source_fits(self) -> Self:
        """The settings of the source, of its losses and of the path fit each other."""
        source, loss = self.source, self.loss
        if loss.encoder_gradient == "start" and self.time.at_start == 0 and 0.0 not in self.time.points:
            raise ValueError(
                "loss.encoder_gradient = start trains the source encoder by the samples at t = 0, of which there are "
                "none: set time.at_start, to 0.5 for example."
            )
        if source.kind == "gaussian" and (loss.direction_weight > 0 or loss.mean_weight > 0):
            raise ValueError(
                "loss.direction_weight and loss.mean_weight train a source encoder, which source.kind = gaussian lacks."
            )
        if loss.decoded != "none" and self.interval.is_map:
            raise ValueError(
                f"loss.decoded = {loss.decoded} looks at the end of one step of a velocity, and interval.target = "
                f"{self.interval.target} trains jumps: use it with interval.target=none, and distil the run afterwards."
            )
        if (loss.decoded == "features") != (loss.decoded_network is not None):
            raise ValueError(
                "loss.decoded = features and loss.decoded_network belong together: name the network by which features "
                "are compared, such as loss.decoded_network=timm:vgg16.tv_in1k, or leave both out."
            )
        if self.path.noise > 0 and source.kind != "deterministic":
            raise ValueError(
                f"path.noise = {self.path.noise:g} is the only noise of a bridge, and source.kind = {source.kind} adds "
                "its own: set source.kind=deterministic, or leave path.noise at 0."
            )
        return self

    @model_validator(mode="after")
    def _jumps_fit(self) -> Self:
        """The settings of few-step sampling fit each other."""
        interval, backbone = self.interval, self.backbone
        is_range = interval.guidance[0] < interval.guidance[1]
        if interval.is_map != (backbone.interval != "none"):
            raise ValueError(
                f"interval.target = {interval.target} and backbone.interval = {backbone.interval} do not fit: a "
                "flow map needs a target (derivative or composition) and a reading of the jump's end (added or split)."
            )
        if backbone.guided != is_range:
            raise ValueError(
                f"interval.guidance = {list(interval.guidance)} and backbone.guided = {str(backbone.guided).lower()} "
                "do not fit: a network that takes the guidance scale is trained on a range of scales, others on one."
            )
        if interval.target == "derivative" and backbone.name != "dimr" and backbone.time_scale > SMOOTH_TIME_SCALE:
            raise ValueError(
                "interval.target = derivative differentiates the network by t, and this one embeds t at "
                f"backbone.time_scale = {backbone.time_scale:g}, where derivatives are mostly noise. Use composition, "
                "which needs none, or a network trained with backbone.time_scale=1."
            )
        if interval.target == "reflow" and interval.teacher is None:
            raise ValueError("interval.target = reflow needs interval.teacher, the run whose flow is straightened.")
        if interval.target == "reflow" and is_range:
            raise ValueError(
                "interval.target = reflow builds in a single guidance scale: give interval.guidance=[w,w]."
            )
        if interval.guidance[1] > 1 and interval.teacher is None and self.guidance.drop == 0:
            raise ValueError(
                "interval.guidance builds guidance in, which needs the unconditional velocity: train with "
                "guidance.drop=0.1, or name an interval.teacher that was."
            )
        return self
