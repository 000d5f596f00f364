"""Runs the jobs of an ablation one after another, each in its own process.

A job that crashes, runs out of memory or is killed does not stop the others. Its log and the reason are kept, and the
ablation continues where it was when it is started again.
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

from crossflow.benchmarks.ablation.group import Group
from crossflow.benchmarks.ablation.plan import Budget, Job, Plan
from crossflow.core import launcher
from crossflow.core.errors import UserError
from crossflow.core.files import write_atomically
from crossflow.core.lock import FolderLock
from crossflow.core.progress import duration
from crossflow.engine.train import dry_run
from crossflow.tasks import load_config, task_class

PLAN, FAILURES = "ablation.json", "failures.json"
EXTENDABLE = ("seeds", "only")
"""Entries of a folder's plan that may differ when the ablation is started again."""
Say = Callable[[str], None]
"""Prints one line for the user."""
Execute = Callable[[Job, Path, Say], int]
"""(job, log file, say) -> exit status; the command's output goes to the log."""
HEARTBEAT = 30.0
"""Seconds between two messages about a running job."""


# -- the number of steps


def plan_with_minutes(
    group: Group, budget: Budget, folder: Path, minutes: float | None, say: Say, *, measure: bool = True
) -> Plan:
    """The plan of a group whose runs take `minutes` each; None: the steps of the budget.

    The number of steps is measured once and kept in the folder. Without `measure` an unmeasured plan has the steps of
    the recipe, and a message says so.
    """
    plan = Plan(group, budget, folder)
    if minutes is None:
        return plan
    steps = known_steps(folder)
    if steps is not None:
        say(f"{steps} steps for every run, as in the ablation that this folder contains.")
    elif not measure:
        say(f"--minutes is measured when the runs start; the commands below have the recipe's {plan.steps} steps.")
        return plan
    else:
        say("Measuring the time per step of each variant.")
        steps = steps_for(plan, minutes)
        say(f"{steps} steps for every run.")
    return Plan(group, replace(budget, steps=steps), folder)


def steps_for(plan: Plan, minutes: float) -> int:
    """Steps that the slowest training of a plan takes in `minutes` on this machine, measured by dry runs."""
    slowest = 0.0
    timed: set[str] = set()
    for job in plan.jobs:
        label = job.name.rpartition("-seed")[0]
        if job.kind != "train" or label in timed or job.after:  # starting from weights does not change the speed
            continue
        timed.add(label)
        data = [f"data.train={plan.budget.data}"] if plan.budget.data is not None else []
        overrides = [*data, *job.overrides, *task_class(plan.budget.task).quick]
        try:
            config = load_config(plan.budget.recipe, overrides, plan.budget.task)
            report = dry_run(config)
        except UserError:
            if all(plan.group.variants[name].optional for name in job.variants):
                continue
            raise
        slowest = max(slowest, report.seconds_per_step)
    if not slowest:
        raise UserError(f"No run of {plan.group.name} can be measured here; give --steps instead of --minutes.")
    return max(1, round(60 * minutes / slowest))


# -- the jobs


def run(plan: Plan, say: Say, execute: Execute | None = None, after_each: Callable[[], object] | None = None) -> None:
    """Runs the unfinished jobs in order; failures are reported, and the remaining jobs continue without them.

    after_each: called whenever a job has ended. Raises UserError if the folder belongs to another plan, or if a job of
    it is still running.
    """
    if launcher.world_size() > 1:
        raise UserError("An ablation starts its own runs, one after another: start it without a launcher.")
    with _locked(plan) as lock:
        execute = execute or Processes(lock)
        failures: dict[str, str] = {}
        pending = [job for job in plan.jobs if not job.done]
        say(f"{len(plan.jobs) - len(pending)} of {len(plan.jobs)} jobs are done; results in {plan.folder}.")
        start = time.monotonic()
        for number, job in enumerate(pending):
            spent = time.monotonic() - start
            left = f", about {duration(spent / number * (len(pending) - number))} left" if number else ""
            say(f"[{number + 1}/{len(pending)}] {job.name}{left}")
            failure = _run_job(plan, job, failures, execute, say)
            if failure is not None:
                failures[job.name] = failure
                say(f"{job.name}: {failure}")
            write_atomically(plan.folder / FAILURES, json.dumps(failures, indent=1))
            if after_each is not None:
                after_each()
        write_atomically(plan.folder / FAILURES, json.dumps(failures, indent=1))


def _run_job(plan: Plan, job: Job, failures: dict[str, str], execute: Execute, say: Say) -> str | None:
    """Runs a job; returns why it failed, or None."""
    missing = [name for name in job.after if name in failures]
    if missing:
        return f"needs a job that failed: {missing[0]}"
    log = plan.folder / "logs" / f"{job.name.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    status = execute(job, log, say)
    return None if job.done else reason(status, log)


@dataclass(frozen=True)
class Processes:
    """Runs a job as `python -m crossflow ...`.

    lock: file descriptor that the process inherits, so that the folder stays locked if only its parent is killed.
    """

    lock: int

    def __call__(self, job: Job, log: Path, say: Say) -> int:
        """Exit status of the job; `say` gets the last line of its log every `HEARTBEAT` seconds."""
        command = [sys.executable, "-m", "crossflow", *job.command]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, pass_fds=(self.lock,))
            while True:
                try:
                    return process.wait(HEARTBEAT)
                except subprocess.TimeoutExpired:
                    say(f"  {_last_line(log)}")
                except BaseException:  # Ctrl-C reaches the process as well: it writes a checkpoint and ends
                    process.terminate()
                    process.wait()
                    raise


def reason(status: int, log: Path) -> str:
    """Why a job failed, in words, from its exit status and the last line of its log."""
    last = _last_line(log)
    if status < 0:
        return f"killed by signal {-status}{' (out of memory?)' if status == -9 else ''}; last line: {last}"
    if status == 2:
        return last
    return f"ended with status {status}: {last}; see {log.parent.name}/{log.name}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1].strip()[-600:] if lines else "no output"


# -- the folder


@contextmanager
def _locked(plan: Plan) -> Iterator[int]:
    """Keeps two processes out of one folder, and one folder from two plans; yields the descriptor of the lock."""
    with FolderLock(plan.folder) as lock:
        _keep_plan(plan)
        yield lock.fileno()


def _keep_plan(plan: Plan) -> None:
    """Records what all runs of the folder share. Raises UserError if it differs from what the folder contains; further
    seeds and variants may be added.
    """
    budget = plan.budget
    current: dict[str, Any] = {"group": plan.group.name, "task": budget.task, "recipe": budget.recipe}
    current |= {"data": budget.data, "steps": plan.steps, "num_items": budget.num_items, "split": budget.split}
    current |= {"protocol": budget.protocol, "eval_data": budget.eval_data}
    current |= {"overrides": list(budget.overrides), "seeds": list(budget.seeds), "only": list(budget.only)}
    path = plan.folder / PLAN
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in current if name not in EXTENDABLE and before.get(name) != current[name]]
        if changed:
            words = ", ".join(f"{name} {before.get(name)!r} -> {current[name]!r}" for name in changed)
            raise UserError(f"{plan.folder} contains an ablation with other settings: {words}. Use another --output.")
    write_atomically(path, json.dumps(current, indent=1))


def known_steps(folder: Path) -> int | None:
    """Steps of each run of the ablation in a folder; None if there is none."""
    path = folder / PLAN
    return int(json.loads(path.read_text(encoding="utf-8"))["steps"]) if path.is_file() else None


def failures_in(folder: Path) -> dict[str, str]:
    """Why jobs failed the last time, by name."""
    path = folder / FAILURES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
