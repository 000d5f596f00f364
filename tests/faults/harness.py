"""Kills jobs of all four tasks at random instants and compares what they end with after being continued.

    python tests/faults/harness.py                     60 kills, in about ten minutes
    python tests/faults/harness.py --kills 8 --only sr --seed 1

A job is a training, a cache or an evaluation. It is run undisturbed first; then it is started in another folder, killed
(SIGKILL) at a random instant, started again, killed again, ..., and at last allowed to end. A kill is survived if every
checkpoint under its final name is intact after it, and the files at the end are those of the undisturbed job, bit for
bit. A third of the kills of a training come while it writes a checkpoint.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

TASKS = ("t2i", "caption", "depth", "sr")
SMALL = [
    *("data.image_size=16", "data.num_train=10", "data.num_val=4", "source.width=16", "source.depth=1"),
    *("backbone.width=16", "backbone.depth=1", "backbone.heads=2", "sample.steps=2"),
    *("train.steps=10", "train.batch_size=4", "train.precision=no", "train.ema=0.9", "train.save_every=2"),
    *("train.eval_every=4", "train.sample_every=6", "train.log_every=1"),
]
VARIANTS = {
    "t2i": ["train.accumulate=2"],
    "caption": [
        *("caption.text_steps=4", "caption.text_batch_size=8", "caption.autoencoder.width=16"),
        *("caption.joint=true", "train.precision=bf16"),
    ],
    "depth": ["train.num_workers=1", "train.optimizer=muon"],
    "sr": ["data.image_size=32", "sr.tile=16", "sr.overlap=4", "train.precision=bf16", "train.accumulate=2"],
}
CLOCK = {"seconds_per_step", "cpu_seconds_per_step", "samples_per_second", "data_seconds"}
SECONDS = 600  # after which a job counts as hanging


@dataclass
class Job:
    """A command that writes to the folder behind --output and continues there."""

    name: str
    command: list[str]
    kills: int
    kills_in_save: int = 0
    survived: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Killer:
    """Starts jobs as processes and kills them. forked: the module forked.py."""

    forked: ModuleType
    folder: Path
    instants: random.Random

    def start(self, job: Job, output: Path) -> Any:
        """The process of a job that writes to `output`."""
        arguments = ["-m", "crossflow", *job.command, "--output", str(output)]
        return self.forked.Forked(arguments, self.folder / f"{job.name}.log")

    def torture(self, job: Job) -> None:
        """Kills a job as often as it wants, and notes how many kills it survived."""
        whole, parts = self.folder / f"{job.name}-whole", self.folder / f"{job.name}-parts"
        self.forked.Forked(["-m", "crossflow", "list", "tasks"], self.folder / "warm.log").finish()
        started = time.monotonic()
        self.start(job, whole).finish()
        seconds = time.monotonic() - started
        expected, pending = contents(whole), 0
        while job.survived + pending < job.kills and not job.problems:
            in_save = job.kills - job.survived - pending <= job.kills_in_save
            process = self.start(job, parts)
            hit = self.kill_in_save(process, parts) if in_save else self.kill_after(process, seconds)
            ended = process.poll() == 0 or has_ended(parts)
            if hit and not ended:
                pending += 1
                job.problems += damages(parts)
            elif ended:  # before its turn; the next kill meets a new one
                job.survived, pending = job.survived + self.settled(job, parts, expected, pending), 0
                shutil.rmtree(parts)
                seconds *= 0.9  # a machine under changing load
            elif process.poll() != -signal.SIGKILL:
                job.problems.append(process.output())
        if not job.problems:
            self.start(job, parts).finish()
            job.survived += self.settled(job, parts, expected, pending)

    @staticmethod
    def settled(job: Job, parts: Path, expected: dict[str, bytes], pending: int) -> int:
        """How many of the pending kills a finished job has survived: all or none."""
        present = contents(parts)
        different = [name for name in sorted({*expected, *present}) if expected.get(name) != present.get(name)]
        job.problems += [f"differs: {name}" for name in different]
        return 0 if different else pending

    def kill_after(self, process: Any, seconds: float) -> bool:
        """Kills at a random instant of the job's length; whether it was still running."""
        time.sleep(self.instants.random() * seconds)
        process.kill()
        return bool(process.wait() == -signal.SIGKILL)

    def kill_in_save(self, process: Any, folder: Path) -> bool:
        """Kills while a checkpoint is being written, after up to two others; whether that was so."""
        saves: set[str] = set()
        limit, deadline = self.instants.randrange(3), time.monotonic() + SECONDS
        while process.poll() is None and len(saves) <= limit:
            assert time.monotonic() < deadline, f"no end after {SECONDS} s: {process.output()}"
            saves |= {path.name for path in half_written(folder)}
            time.sleep(0.0005)
        time.sleep(self.instants.random() * 0.003)
        process.kill()
        return bool(process.wait() == -signal.SIGKILL) and bool(half_written(folder))


def has_ended(folder: Path) -> bool:
    """Whether an evaluation has released its folder: a kill then met a process on its way out, with nothing left to do,
    and the same command would be refused. (Trainings and caches say that they are finished.)
    """
    return (folder / "metrics.json").is_file() and not (folder / ".lock").exists()


def half_written(folder: Path) -> list[Path]:
    """The checkpoints of a run that are being written."""
    return [path for path in (folder / "checkpoints").glob(".tmp-step_*") if path.is_dir()]


def damages(folder: Path) -> list[str]:
    """What is wrong with the checkpoints of a killed job."""
    from crossflow.core.training import checkpoint

    problems = []
    for path in checkpoint.checkpoints(folder / "checkpoints"):
        try:
            checkpoint.verify(path)
        except checkpoint.CorruptCheckpoint as error:
            problems.append(str(error))
    return problems


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a finished job by name, without times and without what a killed process left."""
    files: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".tmp-") for part in path.parts):
            files[name] = b"\n".join(timeless(path))
    files.pop("index.html", None)  # the page of an evaluation shows its manifest
    return files


def timeless(path: Path) -> Iterator[bytes]:
    """A file line by line, without the times and places that it records."""
    content = path.read_bytes()
    if path.name == "metrics.jsonl":
        for line in content.splitlines():
            yield json.dumps({k: v for k, v in json.loads(line).items() if k not in CLOCK}).encode()
    elif path.name == "metrics.json":
        yield json.dumps({k: v for k, v in json.loads(content).items() if k != "manifest"}).encode()
    elif path.name == "manifest.json" and "started" in (about := json.loads(content)):
        yield json.dumps(about["data"]).encode()
    else:
        yield content


def jobs(kills: int, only: list[str], runs: Path) -> list[Job]:
    """The jobs among which the kills are divided: of each task six parts training, of the others one each."""
    chosen = [task for task in TASKS if not only or task in only]
    parts = [
        Job(f"train-{task}", ["train", "--task", task, "--resume", "auto", *SMALL, *VARIANTS[task]], 0)
        for task in chosen
    ]
    for task in chosen:
        command = ["evaluate", "--checkpoint", str(runs / f"train-{task}-whole"), "--num", "6", "batch_size=1"]
        parts.append(Job(f"evaluate-{task}", command, 0))
    if "t2i" in chosen:
        cache = ["cache", "--config", "t2i_tiny", "--data", "scenes", "--shard-items", "2", "--batch-size", "2"]
        parts.append(Job("cache", [*cache, "data.image_size=16", "data.num_train=20", "data.num_val=4"], 0))
    weights = [12 if job.name.startswith("train") else 4 if job.name == "cache" else 2 for job in parts]
    for job, weight in zip(parts, weights, strict=True):
        job.kills = max(1, round(kills * weight / sum(weights)))
    parts[0].kills += kills - sum(job.kills for job in parts)
    for job in parts:
        job.kills_in_save = job.kills // 3 if job.name.startswith("train") else 0
    return [job for job in parts if job.kills > 0]


def run(kills: int, only: list[str], seed: int, folder: Path) -> list[Job]:
    """Runs the jobs one after another, and prints a line for each."""
    path = Path(__file__).parents[1] / "forked.py"
    spec = importlib.util.spec_from_file_location("crossflow_tests_forked", path)
    assert spec is not None
    assert spec.loader is not None
    forked = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = forked
    spec.loader.exec_module(forked)
    killer, work = Killer(forked, folder, random.Random(seed)), jobs(kills, only, folder)
    for job in work:
        killer.torture(job)
        print(
            f"{job.name}: {job.survived} of {job.kills} kills survived, {job.kills_in_save} inside a save", flush=True
        )
        for problem in job.problems:
            print(f"  {problem}", flush=True)
    print(f"{sum(job.survived for job in work)} of {sum(job.kills for job in work)} kills survived")
    return work


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--only", action="append", default=[], choices=TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the jobs write; by default a temporary folder")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="crossflow-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    work = run(options.kills, options.only, options.seed, folder)
    if options.folder is None:
        shutil.rmtree(folder)
    return int(any(job.survived < job.kills for job in work))


if __name__ == "__main__":
    sys.exit(main())
