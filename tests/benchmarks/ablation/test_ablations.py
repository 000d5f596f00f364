"""Ablations: every shipped group is valid, runs resume after a kill, failures stay apart, and orders are reported."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from crossflow.benchmarks.ablation import page as ablation_page
from crossflow.benchmarks.ablation import results as ablation_results
from crossflow.benchmarks.ablation import run as ablations
from crossflow.benchmarks.ablation.group import Group, groups, load_group
from crossflow.benchmarks.ablation.plan import Budget, Job, Plan, written
from crossflow.benchmarks.ablation.run import reason, run
from crossflow.benchmarks.report.paper import paper
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.settings import build, parse_overrides
from crossflow.tasks import load_config, task_names

GROUPS = ["encoder", "guidance", "loss", "path", "size", "solver", "source", "text", "training"]
SCORES = {"deterministic": 0.1, "noisy": 0.2, "variational": 0.3, "gaussian": 0.4}


def plan(group: str, folder: Path, *, task: str = "t2i", steps: int | None = 10, **more) -> Plan:
    return Plan(load_group(group), Budget(task=task, recipe=f"{task}_tiny", steps=steps, **more), folder)


@pytest.fixture
def pretend():
    """pretend(fail): executes jobs by writing their files; jobs with `fail` in their name crash."""

    def make(fail: str = "nothing", stop_at: int | None = None):
        done: list[str] = []

        def execute(job: Job, log: Path, say) -> int:
            if stop_at is not None and len(done) == stop_at:
                raise KeyboardInterrupt
            done.append(job.name)
            if fail in job.name:
                log.write_text("step 1\nerror: the file does not exist\n")
                return 2
            job.mark.parent.mkdir(parents=True)
            if job.kind == "train":
                (job.mark.parent / "metrics.jsonl").write_text('{"kind": "train", "step": 10, "seconds_per_step": 6}\n')
                job.mark.write_text("{}")
                return 0
            value = SCORES[job.variants[0]] + 0.01 * job.seed
            about = {"task": "t2i", "num_items": 4, "sample": {"solver": "euler", "steps": 2}}
            job.mark.write_text(json.dumps({"scores": {"overall": value}, "manifest": about}))
            return 0

        return execute, done

    return make


# -- the shipped groups


def test_all_groups_are_shipped() -> None:
    assert sorted(groups()) == GROUPS


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS)
def test_every_training_of_a_group_is_a_valid_configuration(name: str, tmp_path: Path) -> None:
    group = load_group(name)
    for task in group.tasks or task_names():
        study = plan(name, tmp_path, task=task, seeds=(0,))
        for job in study.jobs:
            if job.kind == "train":
                load_config(f"{task}_tiny", job.overrides, task)
        for variant in group.variants:
            load_config(f"{task}_tiny", written({"sample": study.sample(variant)}))


@pytest.mark.parametrize("name", GROUPS)
def test_variants_refer_to_existing_rows_of_the_paper(name: str) -> None:
    group = load_group(name)
    rows = {row.name for row in paper().table(group.table).rows} if group.table is not None else set()
    named = {variant.paper for variant in group.variants.values() if variant.paper is not None}
    assert named == (rows if name != "size" else set())  # the paper has no sizes like these


def test_solver_variants_are_named_after_their_evaluations() -> None:
    from crossflow.benchmarks.report.measured import evaluations

    group = load_group("solver")
    for name, variant in group.variants.items():
        if name != "dopri5":
            assert evaluations(variant.sample) == int(name.rpartition("-")[2]), name


# -- plans


def test_variants_that_differ_only_in_sampling_share_their_training(tmp_path: Path) -> None:
    jobs = plan("guidance", tmp_path, seeds=(0, 1)).jobs
    trained = [job.name for job in jobs if job.kind == "train"]
    assert trained == [f"train {label}-seed{seed}" for seed in (0, 1) for label in ("plain", "weak", "indicator")]
    (guided,) = [job for job in jobs if job.name == "evaluate autoguidance-seed1"]
    assert str(tmp_path / "runs" / "weak-seed1") == guided.command[guided.command.index("--guide-with") + 1]
    weak = next(job for job in jobs if job.name == "train weak-seed0")
    assert {"train.steps=2", "guidance.drop=0.0", "seed=0"} <= set(weak.overrides)


def test_a_second_stage_starts_from_the_first_with_a_frozen_encoder(tmp_path: Path) -> None:
    jobs = {job.name: job for job in plan("training", tmp_path, seeds=(0,)).jobs}
    first, frozen = jobs["train encoder-seed0"], jobs["train two-stage-seed0"]
    assert {"loss.flow_weight=0.0", "train.steps=5"} <= set(first.overrides)
    assert {"source.frozen=true", f"train.start_from={tmp_path / 'runs' / 'encoder-seed0'}"} <= set(frozen.overrides)
    assert frozen.after == ("train encoder-seed0",)
    assert not jobs["train joint-seed0"].after
    assert set(first.variants) == {"two-stage", "two-stage-then-joint"}


def test_overrides_apply_to_all_variants_or_to_one(tmp_path: Path) -> None:
    study = plan("text", tmp_path, seeds=(0,), overrides=("train.lr=0.5", "t5:text.encoder=/somewhere/t5"))
    jobs = {job.name: job for job in study.jobs}
    assert all("train.lr=0.5" in job.overrides for job in study.jobs if job.kind == "train")
    assert "text.encoder=/somewhere/t5" in jobs["train t5-seed0"].overrides
    assert "text.encoder=openai/clip-vit-large-patch14" in jobs["train clip-seed0"].overrides
    with pytest.raises(UserError, match="t55"):
        plan("text", tmp_path, overrides=("t55:train.lr=1",))


@pytest.mark.slow
def test_sampling_overrides_apply_to_the_evaluations(tmp_path: Path) -> None:
    study = plan("encoder", tmp_path, overrides=("sample.guidance=3", "noisy:sample.steps=5"))
    assert study.sample("variational") == {"guidance": 3}
    assert study.sample("noisy") == {"guidance": 3, "steps": 5}


@pytest.mark.slow
def test_listing_the_commands_measures_no_steps(tmp_path: Path) -> None:
    lines: list[str] = []
    budget = Budget("t2i", "t2i_tiny")
    study = ablations.plan_with_minutes(load_group("encoder"), budget, tmp_path / "new", 3, lines.append, measure=False)
    assert study.steps == load_config("t2i_tiny").train.steps
    assert "when the runs start" in lines[0]


def test_ablations_refuse_a_launcher(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without a launcher"):
        run(plan("encoder", tmp_path), lambda line: None)


@pytest.mark.slow
def test_runs_can_be_evaluated_by_a_protocol(tmp_path: Path) -> None:
    budget = Budget("t2i", "t2i_tiny", protocol="coco-fid10k", eval_data="coco:x", num_items=None, split=None, steps=3)
    command = Plan(load_group("loss"), budget, tmp_path).jobs[1].command
    assert command[command.index("--protocol") + 1] == "coco-fid10k"
    assert command[command.index("--data") + 1] == "coco:x"
    assert not {"--num", "--split"} & set(command)
    with pytest.raises(UserError, match="coco-fid10k"):
        plan("loss", tmp_path, protocol="coco-fid10")


def test_written_arguments_parse_to_the_same_settings() -> None:
    settings = {"a": {"b": 1e-5, "c": "no", "d": None, "e": [0.1, 2]}, "f": True}
    assert parse_overrides(written(settings)) == settings


def test_invalid_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="for t2i, not for depth"):
        plan("loss", tmp_path, task="depth")
    with pytest.raises(UserError, match="Did you mean 'variational'"):
        plan("encoder", tmp_path, only=("variationel",))
    with pytest.raises(UserError, match="Unknown ablation"):
        load_group("encodr")
    variants = {"a": {"train": "x"}, "b": {"train": "x", "settings": {"train": {"lr": 1}}}}
    about = {"name": "mine", "title": "", "about": "", "table": "ablation-loss"}
    group_of = build(Group, {**about, "reference": "a", "variants": variants})
    with pytest.raises(UserError, match="a and b of mine share the training 'x'"):
        Plan(group_of, Budget("t2i", "t2i_tiny"), tmp_path)
    with pytest.raises(UserError, match="not one of its variants"):
        build(Group, {**about, "reference": "z", "variants": variants})


# -- running


def test_a_killed_ablation_continues_where_it_was(tmp_path: Path, pretend) -> None:
    study = plan("encoder", tmp_path, seeds=(0, 1))
    execute, first = pretend(stop_at=5)
    with pytest.raises(KeyboardInterrupt):
        run(study, lambda line: None, execute)
    execute, second = pretend()
    lines: list[str] = []
    run(study, lines.append, execute)
    assert lines[0].startswith("5 of 16 jobs are done")
    assert sorted(first + second) == sorted(job.name for job in study.jobs)
    assert all(job.done for job in study.jobs)


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others_and_is_retried(tmp_path: Path, pretend) -> None:
    study = plan("encoder", tmp_path, seeds=(0,))
    execute, _ = pretend(fail="train noisy")
    run(study, lambda line: None, execute, after_each=lambda: ablation_page.write(study))
    assert [job.name for job in study.jobs if not job.done] == ["train noisy-seed0", "evaluate noisy-seed0"]
    text = (tmp_path / "ablation.md").read_text()
    assert "- noisy, seed 0: failed: error: the file does not exist" in text
    execute, done = pretend()
    run(study, lambda line: None, execute)
    assert done == ["train noisy-seed0", "evaluate noisy-seed0"]
    assert ablations.failures_in(tmp_path) == {}


def test_variants_without_available_weights_are_skipped(tmp_path: Path, pretend, monkeypatch) -> None:
    monkeypatch.setitem(SCORES, "trained", 0.5)
    study = plan("text", tmp_path, seeds=(0,), only=("trained", "clip"))
    execute, _ = pretend(fail="clip")
    run(study, lambda line: None, execute)
    result = {result.name: result for result in ablation_results.results(study)}
    assert result["clip"].missing[0].startswith("skipped: error")
    assert result["t5"].missing[0] == "not run"
    assert result["trained"].scores["overall"].mean == 0.5


@pytest.mark.slow
def test_a_folder_belongs_to_one_plan_which_may_gain_seeds(tmp_path: Path, pretend) -> None:
    execute, _ = pretend()
    run(plan("encoder", tmp_path, seeds=(0,), only=("noisy",)), lambda line: None, execute)
    run(plan("encoder", tmp_path, seeds=(0, 1)), lambda line: None, execute)
    assert ablations.known_steps(tmp_path) == 10
    with pytest.raises(UserError, match="steps 10 -> 20"):
        run(plan("encoder", tmp_path, steps=20), lambda line: None, execute)


def test_two_processes_cannot_use_one_folder(tmp_path: Path, pretend) -> None:
    study, (execute, _) = plan("encoder", tmp_path), pretend()
    with ablations._locked(study), pytest.raises(UserError, match="still running"):
        run(study, lambda line: None, execute)


def test_failures_are_explained_in_words(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "job.log"
    assert "no output" in reason(1, log)
    log.parent.mkdir()
    log.write_text("step 1\nMemoryError\n")
    assert "out of memory?" in reason(-9, log)
    assert reason(2, log) == "MemoryError"
    assert "status 1: MemoryError; see logs/job.log" in reason(1, log)


# -- results


@pytest.mark.slow
def test_the_page_has_the_papers_numbers_the_measured_ones_and_what_is_missing(tmp_path: Path, pretend) -> None:
    study = plan("encoder", tmp_path, seeds=(0, 1, 2), only=("deterministic", "noisy", "variational"))
    execute, _ = pretend()
    run(study, lambda line: None, execute)
    markdown, html = ablation_page.write(study)
    text = markdown.read_text()
    assert "| 40.78 | 0.23 | 0.31 ± 0.025 |" in text  # 0.30, 0.31, 0.32
    assert "(evaluations/variational-seed0/metrics.json)" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| gaussian")]
    assert "not run" in row
    assert "noisy is better than deterministic in the paper (FID-10K 59.91 and 66.65); reproduced" in text
    assert re.search(r"- deterministic against variational: overall -0.2 ± \S+, worse\.", text)
    assert "only the order of the rows can be compared" in text
    assert "data:image/png" in html.read_text()
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["variants"]["noisy"]["by_seed"]["2"] == {"overall": pytest.approx(0.22)}
    assert result["variants"]["noisy"]["train_seconds"]["mean"] == 60.0


def test_a_reversed_order_is_reported(tmp_path: Path, pretend, monkeypatch) -> None:
    monkeypatch.setitem(SCORES, "variational", 0.05)
    study, (execute, _) = plan("encoder", tmp_path, seeds=(0, 1)), pretend()
    run(study, lambda line: None, execute)
    lines = "\n".join(ablation_results.orders(study, ablation_results.results(study)))
    assert "variational is better than noisy in the paper (FID-10K 40.78 and 59.91); not reproduced: the order" in lines
    small = plan("encoder", tmp_path, seeds=(0,))
    assert "inconclusive with one seed" in "\n".join(ablation_results.orders(small, ablation_results.results(small)))


@pytest.mark.parametrize(
    ("score", "direction"), [("abs_rel", "lower"), ("psnr_y", "higher"), ("rmse_log", "lower"), ("CIDEr", "higher")]
)
def test_the_better_direction_of_scores_is_known(score: str, direction: str) -> None:
    assert ablation_results.better(score) == direction


# -- the command


def test_the_command_lists_groups_and_commands(tmp_path: Path, capsys) -> None:
    assert main(["ablate", "--list"]) == 0
    lines = capsys.readouterr().out
    assert all(f"{name}: " in lines for name in GROUPS)
    folder = str(tmp_path / "out")
    assert main(["ablate", "encoder", "--steps", "5", "--seeds", "1", "--dry-run", "--output", folder]) == 0
    lines = capsys.readouterr().out
    assert lines.count("to do  crossflow train") == lines.count("to do  crossflow evaluate") == 4
    assert not (tmp_path / "out").exists()
    assert main(["ablate", "encoder", "--steps", "5", "--minutes", "1"]) == 2
    assert main(["ablate", "encodr"]) == 2
    assert "'encoder'" in capsys.readouterr().err


def tiny(settings: list[str]) -> tuple[str, ...]:
    """Without the settings that the plan makes."""
    return tuple(word for word in settings if not word.startswith("train.steps"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task"),
    [*((name, "t2i") for name in GROUPS), *(("encoder", task) for task in task_names() if task != "t2i")],
)
def test_every_group_runs(name: str, task: str, tmp_path: Path, tiny_settings, blind_judge, no_java) -> None:
    """In this process, so that the judge can be replaced; two steps, one seed."""
    overrides = (*tiny(tiny_settings(task)), "data.num_train=8", "data.num_val=2", "train.sample_every=0")
    study = plan(name, tmp_path, task=task, steps=2, seeds=(0,), num_items=2, overrides=overrides)

    def execute(job: Job, log: Path, say) -> int:
        log.write_text("no such weights here")
        return main(list(job.command))

    run(study, lambda line: None, execute)
    ablation_page.write(study)
    left = {variant for job in study.jobs if not job.done for variant in job.variants}
    assert left == {variant for variant in study.variants if study.group.variants[variant].optional}
    for result in ablation_results.results(study):
        assert result.missing or (result.scores and result.train_seconds is not None)


@pytest.mark.slow
def test_the_command_runs_each_training_in_its_own_process(
    tmp_path: Path, tiny_settings, forked, monkeypatch, capsys
) -> None:
    """One of them cannot start: it is reported, and the other is complete."""
    commands = []

    def start(command: list[str], stdout, **descriptors):
        commands.append(command)
        return forked.Forked(command[1:], Path(stdout.name))

    monkeypatch.setattr(ablations, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": start}))
    settings = [*tiny(tiny_settings("sr")), "noisy:backbone.patch=5"]
    argv = ["ablate", "encoder", "--task", "sr", "--steps", "2", "--seeds", "1", "--num", "4"]
    argv += ["--only", "deterministic", "--only", "noisy", "--output", str(tmp_path), *settings]
    assert main(argv) == 0
    assert [command[1:4] for command in commands] == [
        ["-m", "crossflow", job] for job in ("train", "evaluate", "train")
    ]
    lines = capsys.readouterr().out
    assert "Not done: train noisy-seed0, evaluate noisy-seed0" in lines
    assert "multiple of" in lines
    assert (tmp_path / "evaluations" / "deterministic-seed0" / "metrics.json").is_file()
    assert "failed: error: The training crop" in (tmp_path / "ablation.md").read_text()


@pytest.mark.slow
def test_minutes_become_steps_once(tmp_path: Path, tiny_settings) -> None:
    budget = Budget(
        "sr", "sr_tiny", seeds=(0,), only=("deterministic", "gaussian"), overrides=tiny(tiny_settings("sr"))
    )
    lines: list[str] = []
    result = ablations.plan_with_minutes(load_group("encoder"), budget, tmp_path, 0.05, lines.append)
    assert result.steps > 1
    ablations._keep_plan(result)
    assert ablations.plan_with_minutes(load_group("encoder"), budget, tmp_path, 5, lines.append).steps == result.steps
    assert len([line for line in lines if "Measuring" in line]) == 1
