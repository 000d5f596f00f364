"""Ablations: every shipped group is possible, runs go on after a kill, failures stay apart, and orders are told."""

import json
import re
from pathlib import Path

import pytest

from crossflow.benchmarks.ablation import page as ablation_page
from crossflow.benchmarks.ablation import results as ablation_results
from crossflow.benchmarks.ablation import run as ablations
from crossflow.benchmarks.ablation.plan import Budget, Group, Job, Plan, groups, load_group, written
from crossflow.benchmarks.ablation.run import reason, run
from crossflow.benchmarks.report.paper import paper
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.settings import build, parse_overrides
from crossflow.tasks.base import build_task, load_config

GROUPS = ["encoder", "guidance", "loss", "path", "size", "solver", "text", "training"]
SCORES = {"deterministic": 0.1, "noisy": 0.2, "variational": 0.3, "gaussian": 0.4}


def plan(group: str, folder: Path, *, task: str = "t2i", steps: int | None = 10, **more) -> Plan:
    return Plan(load_group(group), Budget(task=task, recipe=f"{task}_tiny", steps=steps, **more), folder)


@pytest.fixture
def pretend():
    """pretend(fail): does jobs by writing what they would leave; jobs with `fail` in their name crash."""

    def make(fail: str = "nothing", stop_at: int | None = None):
        done: list[str] = []

        def execute(job: Job, log: Path, tell) -> int:
            if stop_at is not None and len(done) == stop_at:
                raise KeyboardInterrupt
            done.append(job.name)
            if fail in job.name:
                log.write_text("some words\nerror: there is no such thing\n")
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


def test_every_group_is_there() -> None:
    assert sorted(groups()) == GROUPS


@pytest.mark.parametrize("name", GROUPS)
def test_every_training_of_a_group_is_a_possible_configuration(name: str, tmp_path: Path) -> None:
    group = load_group(name)
    for task in group.tasks:
        made = plan(name, tmp_path, task=task, seeds=(0,))
        for job in made.jobs:
            if job.kind == "train":
                build_task(load_config(f"{task}_tiny", job.overrides, task))
        for variant in group.variants:
            load_config(f"{task}_tiny", written({"sample": made.sample(variant)}))


@pytest.mark.parametrize("name", GROUPS)
def test_rows_of_the_paper_are_named_as_the_paper_has_them(name: str) -> None:
    group = load_group(name)
    rows = {row.name for row in paper().table(group.table).rows} if group.table is not None else set()
    named = {variant.paper for variant in group.variants.values() if variant.paper is not None}
    assert named == (rows if name != "size" else set())  # the paper has no sizes like these


def test_solver_variants_are_called_by_their_evaluations() -> None:
    from crossflow.benchmarks.report.measured import evaluations

    group = load_group("solver")
    for name, variant in group.variants.items():
        if name != "dopri5":
            assert evaluations(variant.sample) == int(name.rpartition("-")[2]), name


# -- plans


def test_variants_that_differ_in_sampling_alone_share_their_training(tmp_path: Path) -> None:
    jobs = plan("guidance", tmp_path, seeds=(0, 1)).jobs
    trained = [job.name for job in jobs if job.kind == "train"]
    assert trained == [f"train {label}-seed{seed}" for seed in (0, 1) for label in ("plain", "weak", "indicator")]
    (guided,) = [job for job in jobs if job.name == "evaluate autoguidance-seed1"]
    assert str(tmp_path / "runs" / "weak-seed1") == guided.command[guided.command.index("--guide-with") + 1]
    weak = next(job for job in jobs if job.name == "train weak-seed0")
    assert {"train.steps=2", "guidance.drop=0.0", "seed=0"} <= set(weak.overrides)


def test_the_second_stage_starts_from_the_first_and_is_frozen(tmp_path: Path) -> None:
    jobs = {job.name: job for job in plan("training", tmp_path, seeds=(0,)).jobs}
    first, frozen = jobs["train encoder-seed0"], jobs["train two-stage-seed0"]
    assert {"loss.flow_weight=0.0", "train.steps=5"} <= set(first.overrides)
    assert {"source.frozen=true", f"train.start_from={tmp_path / 'runs' / 'encoder-seed0'}"} <= set(frozen.overrides)
    assert frozen.after == ("train encoder-seed0",)
    assert not jobs["train joint-seed0"].after
    assert set(first.variants) == {"two-stage", "two-stage-then-joint"}


def test_settings_can_be_given_for_all_or_for_one_variant(tmp_path: Path) -> None:
    made = plan("text", tmp_path, seeds=(0,), overrides=("train.lr=0.5", "t5:text.encoder=/somewhere/t5"))
    jobs = {job.name: job for job in made.jobs}
    assert all("train.lr=0.5" in job.overrides for job in made.jobs if job.kind == "train")
    assert "text.encoder=/somewhere/t5" in jobs["train t5-seed0"].overrides
    assert "text.encoder=openai/clip-vit-large-patch14" in jobs["train clip-seed0"].overrides
    with pytest.raises(UserError, match="t55"):
        plan("text", tmp_path, overrides=("t55:train.lr=1",))


def test_how_runs_are_sampled_can_be_given(tmp_path: Path) -> None:
    made = plan("encoder", tmp_path, overrides=("sample.guidance=3", "noisy:sample.steps=5"))
    assert made.sample("variational") == {"guidance": 3}
    assert made.sample("noisy") == {"guidance": 3, "steps": 5}


def test_listing_the_commands_measures_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    budget = Budget("t2i", "t2i_tiny")
    made = ablations.planned(load_group("encoder"), budget, tmp_path / "new", 3, said.append, measure=False)
    assert made.steps == load_config("t2i_tiny").train.steps
    assert "when the runs begin" in said[0]


def test_a_launcher_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without a launcher"):
        run(plan("encoder", tmp_path), lambda text: None)


def test_runs_can_be_evaluated_by_a_protocol(tmp_path: Path) -> None:
    budget = Budget("t2i", "t2i_tiny", protocol="coco-fid10k", eval_data="coco:x", num_items=None, split=None, steps=3)
    command = Plan(load_group("loss"), budget, tmp_path).jobs[1].command
    assert command[command.index("--protocol") + 1] == "coco-fid10k"
    assert command[command.index("--data") + 1] == "coco:x"
    assert not {"--num", "--split"} & set(command)
    with pytest.raises(UserError, match="coco-fid10k"):
        plan("loss", tmp_path, protocol="coco-fid10")


def test_arguments_are_read_back_as_they_were() -> None:
    settings = {"a": {"b": 1e-5, "c": "no", "d": None, "e": [0.1, 2]}, "f": True}
    assert parse_overrides(written(settings)) == settings


def test_impossible_plans_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="for t2i, not for depth"):
        plan("loss", tmp_path, task="depth")
    with pytest.raises(UserError, match="Did you mean 'variational'"):
        plan("encoder", tmp_path, only=("variationel",))
    with pytest.raises(UserError, match="Unknown ablation"):
        load_group("encodr")
    variants = {"a": {"train": "x"}, "b": {"train": "x", "settings": {"train": {"lr": 1}}}}
    about = {"name": "mine", "title": "", "about": "", "table": "ablation-loss"}
    mine = build(Group, {**about, "reference": "a", "variants": variants})
    with pytest.raises(UserError, match="a and b of mine share the training 'x'"):
        Plan(mine, Budget("t2i", "t2i_tiny"), tmp_path)
    with pytest.raises(UserError, match="no variant"):
        build(Group, {**about, "reference": "z", "variants": variants})


# -- running


def test_a_killed_ablation_goes_on_where_it_was(tmp_path: Path, pretend) -> None:
    made = plan("encoder", tmp_path, seeds=(0, 1))
    execute, first = pretend(stop_at=5)
    with pytest.raises(KeyboardInterrupt):
        run(made, lambda text: None, execute)
    execute, second = pretend()
    said: list[str] = []
    run(made, said.append, execute)
    assert said[0].startswith("5 of 16 jobs are done")
    assert sorted(first + second) == sorted(job.name for job in made.jobs)
    assert all(job.done for job in made.jobs)


def test_a_run_that_fails_does_not_end_the_others_and_is_tried_again(tmp_path: Path, pretend) -> None:
    made = plan("encoder", tmp_path, seeds=(0,))
    execute, _ = pretend(fail="train noisy")
    run(made, lambda text: None, execute, after_each=lambda: ablation_page.write(made))
    assert [job.name for job in made.jobs if not job.done] == ["train noisy-seed0", "evaluate noisy-seed0"]
    text = (tmp_path / "ablation.md").read_text()
    assert "- noisy, seed 0: failed: error: there is no such thing" in text
    execute, done = pretend()
    run(made, lambda text: None, execute)
    assert done == ["train noisy-seed0", "evaluate noisy-seed0"]
    assert ablations.failures_in(tmp_path) == {}


def test_what_needs_weights_that_are_not_there_is_skipped(tmp_path: Path, pretend, monkeypatch) -> None:
    monkeypatch.setitem(SCORES, "trained", 0.5)
    made = plan("text", tmp_path, seeds=(0,), only=("trained", "clip"))
    execute, _ = pretend(fail="clip")
    run(made, lambda text: None, execute)
    found = {result.name: result for result in ablation_results.results(made)}
    assert found["clip"].missing[0].startswith("skipped: error")
    assert found["t5"].missing[0] == "not run"
    assert found["trained"].scores["overall"].mean == 0.5


def test_a_folder_belongs_to_one_plan_which_may_get_more_seeds(tmp_path: Path, pretend) -> None:
    execute, _ = pretend()
    run(plan("encoder", tmp_path, seeds=(0,), only=("noisy",)), lambda text: None, execute)
    run(plan("encoder", tmp_path, seeds=(0, 1)), lambda text: None, execute)
    assert ablations.known_steps(tmp_path) == 10
    with pytest.raises(UserError, match="steps 10 -> 20"):
        run(plan("encoder", tmp_path, steps=20), lambda text: None, execute)


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path, pretend) -> None:
    made, (execute, _) = plan("encoder", tmp_path), pretend()
    with ablations._alone(made), pytest.raises(UserError, match="still going on"):
        run(made, lambda text: None, execute)


def test_reasons_are_in_words(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "job.log"
    assert "nothing was said" in reason(1, log)
    log.parent.mkdir()
    log.write_text("step 1\nMemoryError\n")
    assert "out of memory?" in reason(-9, log)
    assert reason(2, log) == "MemoryError"
    assert "status 1: MemoryError; see logs/job.log" in reason(1, log)


# -- results


def test_the_page_has_the_papers_numbers_ours_and_what_was_not_run(tmp_path: Path, pretend) -> None:
    made = plan("encoder", tmp_path, seeds=(0, 1, 2), only=("deterministic", "noisy", "variational"))
    execute, _ = pretend()
    run(made, lambda text: None, execute)
    markdown, html = ablation_page.write(made)
    text = markdown.read_text()
    assert "| 40.78 | 0.23 | 0.31 ± 0.025 |" in text  # 0.30, 0.31, 0.32
    assert "(evaluations/variational-seed0/metrics.json)" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| gaussian")]
    assert "not run" in row
    assert "noisy is better than deterministic in the paper (FID-10K 59.91 and 66.65); reproduced" in text
    assert re.search(r"- deterministic against variational: overall -0.2 ± \S+, worse\.", text)
    assert "Only the order of rows can be compared" in text
    assert "data:image/png" in html.read_text()
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["variants"]["noisy"]["by_seed"]["2"] == {"overall": pytest.approx(0.22)}
    assert found["variants"]["noisy"]["train_seconds"]["mean"] == 60.0


def test_an_order_that_is_not_the_papers_is_said(tmp_path: Path, pretend, monkeypatch) -> None:
    monkeypatch.setitem(SCORES, "variational", 0.05)
    made, (execute, _) = plan("encoder", tmp_path, seeds=(0, 1)), pretend()
    run(made, lambda text: None, execute)
    said = "\n".join(ablation_results.orders(made, ablation_results.results(made)))
    assert "variational is better than noisy in the paper (FID-10K 40.78 and 59.91); not reproduced: the other" in said
    one = plan("encoder", tmp_path, seeds=(0,))
    assert "decides nothing" in "\n".join(ablation_results.orders(one, ablation_results.results(one)))


@pytest.mark.parametrize(
    ("score", "way"), [("abs_rel", "lower"), ("psnr_y", "higher"), ("rmse_log", "lower"), ("CIDEr", "higher")]
)
def test_which_way_is_better_is_known(score: str, way: str) -> None:
    assert ablation_results.better(score) == way


# -- the command


def test_the_command_lists_groups_and_commands(tmp_path: Path, capsys) -> None:
    assert main(["ablate", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in GROUPS)
    folder = str(tmp_path / "out")
    assert main(["ablate", "encoder", "--steps", "5", "--seeds", "1", "--dry-run", "--output", folder]) == 0
    said = capsys.readouterr().out
    assert said.count("to do  crossflow train") == said.count("to do  crossflow evaluate") == 4
    assert not (tmp_path / "out").exists()
    assert main(["ablate", "encoder", "--steps", "5", "--minutes", "1"]) == 2
    assert main(["ablate", "encodr"]) == 2
    assert "'encoder'" in capsys.readouterr().err


def tiny(settings: list[str]) -> tuple[str, ...]:
    """Without what the plan says itself."""
    return tuple(word for word in settings if not word.startswith("train.steps"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task"),
    [*((name, "t2i") for name in GROUPS), *(("encoder", task) for task in ("caption", "depth", "sr"))],
)
def test_every_group_runs(name: str, task: str, tmp_path: Path, tiny_settings, blind_judge) -> None:
    """In this process, so that the judge can be replaced; two steps, one seed."""
    made = plan(name, tmp_path, task=task, steps=4, seeds=(0,), num_items=6, overrides=tiny(tiny_settings(task)))

    def execute(job: Job, log: Path, tell) -> int:
        log.write_text("no such weights here")
        return main(list(job.command))

    run(made, lambda text: None, execute)
    ablation_page.write(made)
    left = {variant for job in made.jobs if not job.done for variant in job.variants}
    assert left == {variant for variant in made.variants if made.group.variants[variant].optional}
    for result in ablation_results.results(made):
        assert result.missing or (result.scores and result.train_seconds is not None)


@pytest.mark.slow
def test_the_command_runs_each_training_in_its_own_process(tmp_path: Path, tiny_settings, capsys) -> None:
    """One of them cannot start: it is told, and the other is complete."""
    settings = [*tiny(tiny_settings("sr")), "noisy:backbone.patch=5"]
    argv = ["ablate", "encoder", "--task", "sr", "--steps", "2", "--seeds", "1", "--num", "4"]
    argv += ["--only", "deterministic", "--only", "noisy", "--output", str(tmp_path), *settings]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "Not done: train noisy-seed0, evaluate noisy-seed0" in said
    assert "multiple of" in said
    assert (tmp_path / "evaluations" / "deterministic-seed0" / "metrics.json").is_file()
    assert "failed: error: The training crop" in (tmp_path / "ablation.md").read_text()


@pytest.mark.slow
def test_minutes_become_steps_once(tmp_path: Path, tiny_settings) -> None:
    made = Budget("sr", "sr_tiny", seeds=(0,), only=("deterministic", "gaussian"), overrides=tiny(tiny_settings("sr")))
    said: list[str] = []
    found = ablations.planned(load_group("encoder"), made, tmp_path, 0.05, said.append)
    assert found.steps > 1
    ablations._keep_plan(found)
    assert ablations.planned(load_group("encoder"), made, tmp_path, 5, said.append).steps == found.steps
    assert len([text for text in said if "Measuring" in text]) == 1
