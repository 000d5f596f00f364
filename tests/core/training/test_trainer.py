"""A run leaves its files and numbers, and nothing but (seed, step) decides what is learned."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import Tensor, nn

from crossflow.core.config import TrainConfig
from crossflow.core.errors import UserError
from crossflow.core.training import checkpoint as state
from crossflow.core.training import prepare
from crossflow.core.training.meter import Meter
from crossflow.core.training.optim import build_optimizer, learning_rate
from crossflow.core.training.prepare import check_sharding, compile_blocks, compiles


def test_a_run_writes_its_files_and_metrics(tiny: ModuleType, tmp_path: Path) -> None:
    result = tiny.trainer(tmp_path, validate=tiny.noisy_validation, eval_every=6).run()
    assert (result.status, result.step, result.reason) == ("finished", 12, "")
    assert result.checkpoint == tmp_path / "checkpoints" / "step_00000012"
    assert [path.name for path in state.checkpoints(tmp_path / "checkpoints")] == ["step_00000012", "step_00000008"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoints", "metrics.jsonl", "model.safetensors", "ema.safetensors", "objective.safetensors"}
    train, val = tiny.lines(tmp_path), tiny.lines(tmp_path, "val")
    assert [line["step"] for line in train] == [3, 6, 9, 12]
    assert [line["step"] for line in val] == [6, 12]
    assert set(train[0]) == {"kind", "step", "loss", "flow", "size", "grad_norm", "unconditional", "lr", "epoch"}
    assert result.losses["flow"] == train[-1]["flow"]
    assert result.scores == {"score": val[-1]["score"]}
    assert train[-1]["loss"] < train[0]["loss"]
    assert train[-1]["epoch"] == pytest.approx(12 * 4 / 10)


def test_weights_of_generator_and_losses_are_saved_separately(tiny: ModuleType, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    trainer.run()
    model = load_file(tmp_path / "model.safetensors")
    assert model.keys() == trainer.learner.model.state_dict().keys()
    assert all(torch.equal(model[name], value) for name, value in trainer.learner.model.state_dict().items())
    ema = load_file(tmp_path / "ema.safetensors")
    assert ema.keys() == model.keys()
    assert not torch.equal(ema["backbone.0.weight"], model["backbone.0.weight"])
    assert torch.equal(ema["table"], model["table"])
    assert load_file(tmp_path / "objective.safetensors").keys() == {"head.weight", "head.bias"}


def test_the_logged_rate_follows_the_schedule(tiny: ModuleType, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, log_every=1, schedule="cosine", final_lr=0.001, accumulate=2)
    used = []
    original = trainer.learner.stepper.step
    trainer.learner.stepper.step = lambda: (used.append(trainer.learner.optimizer.param_groups[0]["lr"]), original())
    trainer.run()
    expected = [
        learning_rate(step, lr=0.01, warmup_steps=3, steps=12, schedule="cosine", final_lr=0.001) for step in range(12)
    ]
    assert used == expected
    assert [line["lr"] for line in tiny.lines(tmp_path)] == expected


def test_logged_losses_are_means_over_the_interval(tiny: ModuleType, tmp_path: Path) -> None:
    for every in (1, 4):
        tiny.trainer(tmp_path / str(every), log_every=every).run()
    single, means = tiny.lines(tmp_path / "1"), tiny.lines(tmp_path / "4")
    for index, line in enumerate(means):
        for name in ("loss", "flow", "size", "grad_norm"):
            interval = [other[name] for other in single[4 * index : 4 * index + 4]]
            assert line[name] == pytest.approx(sum(interval) / 4, rel=1e-6)


def test_gradients_are_clipped_and_their_norm_before_is_logged(tiny: ModuleType, tmp_path: Path) -> None:
    norms = []
    for clip in (0.0, 0.5):
        trainer = tiny.trainer(tmp_path / str(clip), grad_clip=clip, log_every=1, steps=1)
        original = trainer.learner.stepper.step

        def step(trainer=trainer, original=original) -> None:  # type: ignore[no-untyped-def]
            gradients = [p.grad for p in trainer.learner.parameters if p.grad is not None]
            norms.append(nn.utils.get_total_norm(gradients).item())
            original()

        trainer.learner.stepper.step = step
        trainer.run()
    logged = [tiny.lines(tmp_path / name)[0]["grad_norm"] for name in ("0.0", "0.5")]
    assert logged[0] == logged[1] == pytest.approx(norms[0])
    assert norms[0] > 0.5
    assert norms[1] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_parts_equal_the_whole_batch(tiny: ModuleType, tmp_path: Path, accumulate: int) -> None:
    runs = []
    for parts in (1, accumulate):
        torch.manual_seed(0)
        objective = tiny.Objective(dropout=False)
        tiny.trainer(tmp_path / str(parts), objective, accumulate=parts).run()
        runs.append(objective.state_dict())
    assert all(torch.allclose(runs[0][name], runs[1][name], atol=1e-6) for name in runs[0])
    for whole, many in zip(tiny.lines(tmp_path / "1"), tiny.lines(tmp_path / str(accumulate)), strict=True):
        assert all(whole[name] == pytest.approx(many[name], rel=1e-5) for name in ("loss", "flow", "size", "grad_norm"))


@pytest.mark.slow
def test_workers_and_validations_do_not_change_the_weights(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "plain").run()
    tiny.trainer(
        tmp_path / "busy",
        num_workers=2,
        validate=tiny.noisy_validation,
        sample=tiny.noisy_validation,
        eval_every=2,
        sample_every=3,
    ).run()
    tiny.assert_same_run(tmp_path / "plain", tmp_path / "busy")


def test_another_seed_gives_another_run(tiny: ModuleType, tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny.trainer(tmp_path / str(seed), tiny.Objective(), seed=seed).run()
    assert tiny.lines(tmp_path / "0")[0]["loss"] != tiny.lines(tmp_path / "1")[0]["loss"]


def test_callbacks_see_averaged_weights_in_evaluation_mode(tiny: ModuleType, tmp_path: Path) -> None:
    objective = tiny.Objective()
    objective.head.eval()  # a module frozen by the user
    records = []

    def validate(step: int) -> dict[str, float]:
        model, average = trainer.learner.model, trainer.learner.ema.state_dict()["backbone.0.weight"]
        records.append((step, torch.equal(model.backbone[0].weight, average), model.backbone[2].training))
        assert not torch.is_grad_enabled()
        return {"score": 1.0}

    trainer = tiny.trainer(tmp_path, objective, validate=validate, eval_every=5)
    original = trainer._train_step
    modes = []

    def train_step(micro_batches) -> None:  # type: ignore[no-untyped-def]
        modes.append(objective.model.backbone[2].training)
        original(micro_batches)

    trainer._train_step = train_step
    trainer.run()
    assert records == [(5, True, False), (10, True, False), (12, True, False)]
    assert modes == [True] * 12


def test_an_interval_of_zero_means_only_at_the_end(tiny: ModuleType, tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    tiny.trainer(
        tmp_path,
        validate=lambda step: calls.append(("val", step)) or {"score": 0.0},
        sample=lambda step: calls.append(("sample", step)),
        on_save=lambda step: calls.append(("save", step)),
        sample_every=6,
    ).run()
    assert calls == [
        ("save", 4), ("sample", 6), ("save", 8), ("save", 12), ("val", 12), ("sample", 12)
    ]  # fmt: skip


def test_an_interrupted_validation_is_repeated_on_resume(tiny: ModuleType, tmp_path: Path) -> None:
    calls: list[int] = []

    def killed(step: int) -> dict[str, float]:
        calls.append(step)
        if step == 8:
            raise KeyboardInterrupt
        return {"score": float(step)}

    settings = {"eval_every": 4, "save_every": 4}
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(tmp_path, validate=killed, **settings).run()
    result = tiny.trainer(tmp_path, validate=lambda step: {"score": float(step)}, **settings).run("auto")
    assert [line["step"] for line in tiny.lines(tmp_path, "val")] == [4, 8, 12]
    assert result.scores == {"score": 12.0}
    assert calls == [4, 8]


def test_an_indivisible_batch_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.batch_size = 4.*multiple of their product 3; for example 3"):
        tiny.trainer(tmp_path, accumulate=3)


def test_data_without_examples_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training data is empty"):
        tiny.trainer(tmp_path, data=tiny.Data(num=0))


def test_fp16_on_the_cpu_is_refused(tiny: ModuleType, tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine trains on its GPU")
    with pytest.raises(UserError, match="Use bf16 or no"):
        tiny.trainer(tmp_path, precision="fp16")


def test_one_process_can_train_in_different_precisions(tiny: ModuleType, tmp_path: Path) -> None:
    records: dict[str, set[torch.dtype]] = {}
    for name, precision in [("a", "no"), ("b", "bf16"), ("c", "no")]:
        torch.manual_seed(0)
        objective = tiny.Objective()
        dtypes = records.setdefault(name, set())
        objective.model.source_encoder.register_forward_hook(lambda m, i, out, dtypes=dtypes: dtypes.add(out.dtype))
        tiny.trainer(tmp_path / name, objective, precision=precision).run()
    assert records == {"a": {torch.float32}, "b": {torch.bfloat16}, "c": {torch.float32}}
    weights = load_file(tmp_path / "b" / "model.safetensors").values()
    assert {value.dtype for value in weights} == {torch.float32}
    assert tiny.lines(tmp_path / "a") != tiny.lines(tmp_path / "b")
    assert tiny.lines(tmp_path / "b")[-1]["loss"] == pytest.approx(tiny.lines(tmp_path / "a")[-1]["loss"], rel=0.1)


def test_a_step_skipped_by_the_gradient_scaler_is_not_an_error(tiny: ModuleType, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, log_every=12)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # overflows until it was halved a few times
    trainer.accelerator.scaler = scaler
    learner, settings = trainer.learner, {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.03}
    learner.optimizer = build_optimizer(learner.objective, scaled=True, **settings)
    trainer.learner.stepper = AcceleratedOptimizer(trainer.learner.optimizer, device_placement=False, scaler=scaler)
    trainer.accelerator._optimizers = [trainer.learner.stepper]
    trainer.run()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert 0 < line["skipped_steps"] < 6
    assert trainer.learner.ema.num_updates == 12 - line["skipped_steps"]
    assert math.isfinite(line["loss"])
    saved = json.loads((tmp_path / "checkpoints" / "step_00000012" / "state.json").read_text())
    assert saved["scaler"]["scale"] == 2.0 ** (127 - line["skipped_steps"])


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(3, 3)] * 2)}) for _ in range(2))
        self.checkpointing = False

    def set_checkpointing(self, on: bool) -> None:
        self.checkpointing = on

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for block in stage["blocks"]:
                x = x + block(x)
        return x


@pytest.mark.slow
def test_compiling_keeps_names_and_values() -> None:
    torch.manual_seed(0)
    model = Backbone()
    x = torch.randn(2, 3)
    names, expected = list(model.state_dict()), model(x)
    assert compile_blocks(model, backend="eager") == 4
    assert torch.allclose(model(x), expected)
    assert list(model.state_dict()) == names


def test_compile_and_checkpointing_reach_the_backbone(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    objective = tiny.Objective()
    objective.model.backbone = Backbone()
    tiny.trainer(tmp_path / "a", objective, compile=True, checkpointing=True).run()
    assert objective.model.backbone.checkpointing
    assert all(isinstance(module, nn.Linear) for module in compiled)
    assert len(compiled) == 4
    with pytest.raises(UserError, match=r"train\.checkpointing"):
        tiny.trainer(tmp_path / "b", checkpointing=True)


def test_only_gpus_that_torch_can_compile_for_compile_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for spec, expected in ((None, False), (object(), True)):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        assert (compiles(TrainConfig(), cpu), compiles(TrainConfig(), gpu)) == (False, expected)
        assert not compiles(TrainConfig(sharding="fsdp"), gpu)
        assert (compiles(TrainConfig(compile=True), cpu), compiles(TrainConfig(compile=False), gpu)) == (True, False)


def test_eight_bit_averages_are_not_sharded() -> None:
    with pytest.raises(UserError, match=r"not those of adamw8bit"):
        check_sharding(TrainConfig(sharding="fsdp", optimizer="adamw8bit"), reads_trained_weights=False)


def test_accumulation_set_by_a_launcher_does_not_divide_twice(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.trainer(tmp_path / "plain").run()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    tiny.trainer(tmp_path / "launched").run()
    tiny.assert_same_run(tmp_path / "plain", tmp_path / "launched")


def test_tensorboard_receives_the_metrics(tiny: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny.trainer(tmp_path, trackers=("tensorboard",), validate=tiny.noisy_validation).run()
    files = list((tmp_path / "trackers").rglob("events.out.tfevents.*"))
    assert files
    scalars: dict[str, list[int]] = {}
    for file in files:
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars[tag] = [event.step for event in events.Scalars(tag)]
    assert scalars["train/loss"] == [3, 6, 9, 12]
    assert scalars["val/score"] == [12]


def test_dry_run_measures_a_run_and_writes_nothing(tiny: ModuleType, tmp_path: Path) -> None:
    report = tiny.trainer(tmp_path / "run").dry_run()
    num_source = 4 * 3 + 3
    num_backbone = (3 * 8 + 8) + 16 + (8 * 3 + 3)
    assert report.parameters == {"model": 4, "backbone": num_backbone, "source_encoder": num_source, "objective": 12}
    num_all = sum(report.parameters.values())
    assert report.memory["weights"] == report.memory["gradients"] == 4 * num_all
    assert report.memory["ema"] == 4 * (num_all - 12)
    assert report.remaining_steps == 12
    assert 0 < report.seconds_per_step < 1
    assert report.remaining_seconds == 12 * report.seconds_per_step
    assert not (tmp_path / "run").exists()
    tiny.trainer(tmp_path / "run").run()
    files = (tmp_path / "run" / "checkpoints" / "step_00000012").glob("*.safetensors")
    assert sum(state.num_bytes(load_file(file)) for file in files) == report.checkpoint_bytes
    assert report.disk_bytes == 3 * report.checkpoint_bytes
    assert tiny.trainer(tmp_path / "run", steps=20).dry_run(resume="auto").remaining_steps == 8


def test_a_step_passes_through_its_phases_in_order(tiny: ModuleType, tmp_path: Path) -> None:
    trainer, passed = tiny.trainer(tmp_path / "run", accumulate=2), []

    @contextmanager
    def record(name: str) -> Iterator[None]:
        passed.append(name)
        yield

    trainer.learner.phase = record
    assert len(list(trainer.trial(1))) == 1
    parts = ["forward", "backward"] * 2
    assert passed == [*["data", "encode"] * 2, "forward", *parts, "optimizer", "ema"]
    assert not (tmp_path / "run").exists()


def test_waiting_for_data_is_logged_beside_the_step_time(tiny: ModuleType, tmp_path: Path) -> None:
    tiny.trainer(tmp_path, data=tiny.Data(seconds=0.005), steps=3).run()
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 0.02 <= line["data_seconds"] < line["seconds_per_step"]  # four examples of 5 ms each


def test_the_share_of_unconditional_samples_is_logged(tiny: ModuleType, tmp_path: Path) -> None:
    class Drawing(tiny.Objective):  # type: ignore[misc,name-defined]
        def draw(self, batches, noises):
            return [replace(batch, unconditional=torch.arange(len(batch)) < 1) for batch in batches]

    tiny.trainer(tmp_path / "drawn", Drawing(), steps=3, accumulate=2).run()
    tiny.trainer(tmp_path / "none", steps=3).run()
    assert tiny.lines(tmp_path / "drawn")[0]["unconditional"] == 0.5  # one of the two samples of each part
    assert tiny.lines(tmp_path / "none")[0]["unconditional"] == 0


def test_an_interval_of_a_run_that_recorded_fewer_numbers_is_continued() -> None:
    meter = Meter(torch.device("cpu"))
    meter.load_state({"names": ["loss"], "sums": [1.0, 2.0], "num_steps": 1})
    meter.add(("loss",), torch.tensor([3.0]), torch.tensor(4.0), torch.tensor(0.1), torch.tensor(False))
    means = meter.take().means
    assert (means["loss"], means["grad_norm"]) == (2.0, 3.0)
    assert math.isnan(means["unconditional"])


def test_nothing_is_printed(tiny: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny.trainer(tmp_path, validate=tiny.noisy_validation).run()
    assert capfd.readouterr() == ("", "")


def test_only_data_parallel_launchers_are_accepted(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_SUPPORTED", set())
    with pytest.raises(UserError, match="data-parallel only"):
        tiny.trainer(tmp_path)
