"""Runs an ablation job by job, each a process of its own, so that one that crashes, runs out of memory or is killed
ends neither the others nor the ablation. Its log and the reason are kept, and the ablation goes on where it was when it
is started again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crossflow.benchmarks.ablation.plan import Budget, Group, Job, Plan
from crossflow.core import distributed
from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically
from crossflow.core.training.tracking import duration
from crossflow.engine.train import dry_run
from crossflow.tasks.base import load_config, task_class

PLAN, FAILURES, LOCK = "ablation.json", "failures.json", ".lock"
Tell = Callable[[str], None]
HEARTBEAT = 30.0
"""Seconds between two words about a job that goes on."""


def planned(
    group: Group, budget: Budget, folder: Path, minutes: float | None, tell: Tell, *, measure: bool = True
) -> Plan:
    """The plan of a group; `minutes` become steps by measuring, once: a folder that was begun keeps its own.

    measure: otherwise a plan whose steps are not known yet has those of the recipe, and that is told.
    """
    plan = Plan(group, budget, folder)
    if minutes is None:
        return plan
    steps = known_steps(folder)
    if steps is not None:
        tell(f"{steps} steps for every run, as this folder was begun with.")
    elif not measure:
        tell(
            f"--minutes is measured when the runs begin; until then the commands have the recipe's {plan.steps} steps."
        )
        return plan
    else:
        tell("Measuring how long the steps of each variant take.")
        steps = steps_for(plan, minutes)
        tell(f"{steps} steps for every run.")
    return Plan(group, replace(budget, steps=steps), folder)


def steps_for(plan: Plan, minutes: float) -> int:
    """Steps that the slowest training of a plan takes in `minutes` on this machine, by a few steps of each."""
    slowest = 0.0
    seen: set[str] = set()
    for job in plan.jobs:
        label = job.name.rpartition("-seed")[0]
        if job.kind != "train" or label in seen or job.after:  # one that starts from another is as fast without
            continue
        seen.add(label)
        quick = task_class(plan.budget.task).quick
        given = [f"data.train={plan.budget.data}"] if plan.budget.data is not None else []
        try:
            config = load_config(plan.budget.recipe, [*given, *job.overrides, *quick], plan.budget.task)
            report = dry_run(config)
        except UserError:
            if all(plan.group.variants[name].optional for name in job.variants):
                continue
            raise
        slowest = max(slowest, report.seconds_per_step)
    if not slowest:
        raise UserError(f"No run of {plan.group.name} can be measured here; give --steps instead of --minutes.")
    return max(1, round(60 * minutes / slowest))


Execute = Callable[[Job, Path, Tell], int]
"""(job, log file, tell) -> exit status; what the command prints goes to the log."""


def run(plan: Plan, tell: Tell, execute: Execute | None = None, after_each: Callable[[], object] | None = None) -> None:
    """Does every job that is not done, in order; one that fails is told and left, with those that need it.

    after_each: called when a job has ended. Raises UserError when the folder holds another plan, or when a job of it
    is still going on.
    """
    if distributed.announced():
        raise UserError("An ablation starts its runs by itself, one after another: call it without a launcher.")
    with _alone(plan) as lock:
        failures: dict[str, str] = {}
        pending = [job for job in plan.jobs if not job.done]
        tell(f"{len(plan.jobs) - len(pending)} of {len(plan.jobs)} jobs are done; results in {plan.folder}.")
        begun = time.monotonic()
        for number, job in enumerate(pending):
            spent = time.monotonic() - begun
            left = f", about {duration(spent / number * (len(pending) - number))} left" if number else ""
            missing = [name for name in job.after if name in failures]
            if missing:
                failures[job.name] = f"needs what failed: {missing[0]}"
            else:
                tell(f"[{number + 1}/{len(pending)}] {job.name}{left}")
                log = plan.folder / "logs" / f"{job.name.replace(' ', '-')}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                status = (execute or Processes(lock))(job, log, tell)
                if not job.done:
                    failures[job.name] = reason(status, log)
            if job.name in failures:
                tell(f"{job.name}: {failures[job.name]}")
            write_atomically(plan.folder / FAILURES, json.dumps(failures, indent=1))
            if after_each is not None:
                after_each()
        write_atomically(plan.folder / FAILURES, json.dumps(failures, indent=1))


@dataclass(frozen=True)
class Processes:
    """Runs a job as `python -m crossflow ...`. `lock`: a file that is locked for as long as the process lives, also
    when the one that started it was killed.
    """

    lock: int

    def __call__(self, job: Job, log: Path, tell: Tell) -> int:
        command = [sys.executable, "-m", "crossflow", *job.command]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, pass_fds=(self.lock,))
            while True:
                try:
                    return process.wait(HEARTBEAT)
                except subprocess.TimeoutExpired:
                    tell(f"  {_last_line(log)}")
                except BaseException:  # Ctrl-C reaches it as well: it writes a checkpoint and ends
                    process.terminate()
                    process.wait()
                    raise


def reason(status: int, log: Path) -> str:
    """Why a job did not do what it should, in words."""
    last = _last_line(log)
    if status < 0:
        return f"killed by signal {-status}{' (out of memory?)' if status == -9 else ''}; last words: {last}"
    if status == 2:
        return last
    return f"ended with status {status}: {last}; see {log.parent.name}/{log.name}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1].strip()[-600:] if lines else "nothing was said"


@contextmanager
def _alone(plan: Plan) -> Iterator[int]:
    """Keeps two processes out of one folder, and one folder from holding two plans; gives the lock."""
    import fcntl

    plan.folder.mkdir(parents=True, exist_ok=True)
    _keep_plan(plan)
    with (plan.folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"Something of this ablation is still going on in {plan.folder} (perhaps a run whose parent was "
                "killed). Wait for its end, or end it; then start again."
            ) from error
        yield file.fileno()


def _keep_plan(plan: Plan) -> None:
    """Writes what the folder's runs have in common; raises UserError when the folder has another. More seeds, and other
    variants, may come later.
    """
    budget = plan.budget
    now: dict[str, Any] = {"group": plan.group.name, "task": budget.task, "recipe": budget.recipe, "data": budget.data}
    now |= {"steps": plan.steps, "num_items": budget.num_items, "split": budget.split}
    now |= {"protocol": budget.protocol, "eval_data": budget.eval_data}
    now |= {"overrides": list(budget.overrides), "seeds": list(budget.seeds), "only": list(budget.only)}
    path = plan.folder / PLAN
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        free = ("seeds", "only")
        different = [name for name in now if name not in free and before.get(name) != now[name]]
        if different:
            told = ", ".join(f"{name} {before.get(name)!r} -> {now[name]!r}" for name in different)
            raise UserError(f"{plan.folder} holds an ablation with other settings: {told}. Choose another --output.")
    write_atomically(path, json.dumps(now, indent=1))


def known_steps(folder: Path) -> int | None:
    """Steps of the runs that a folder's ablation was begun with."""
    path = folder / PLAN
    return int(json.loads(path.read_text(encoding="utf-8"))["steps"]) if path.is_file() else None


def failures_in(folder: Path) -> dict[str, str]:
    path = folder / FAILURES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
