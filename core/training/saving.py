"""Saving: one checkpoint at a time, by the main process or sharded by all, waited for or in the background."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from crossflow.core import distributed
from crossflow.core.training import checkpoint
from crossflow.core.training.checkpoint import Draft
from crossflow.core.training.learner import Learner
from crossflow.core.training.sharding import local

if TYPE_CHECKING:
    from torch.distributed.checkpoint.staging import DefaultStager

WEIGHTS = ("model", "ema", "objective")
"""The parts of a checkpoint that a run directory has as files."""


class Saver:
    """Writes the checkpoints of `learner` to `run_dir`/checkpoints and its weights to `run_dir`; keeps `keep` of them.

        saver.start(state)   # on every process
        ...                  # steps, if background
        saver.finish()

    background: the tensors are copied to host memory and written by a thread. `start` waits for copies from a GPU, and
    for those of shards; on the CPU they are made beside the next step, which waits before it changes weights.
    """

    def __init__(self, learner: Learner, run_dir: Path, *, keep: int, background: bool) -> None:
        self._learner, self._run_dir, self._keep = learner, run_dir, keep
        self._root = run_dir / "checkpoints"
        self._job: Future[Path | None] | None = None
        self._background = background
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        # Of its own, since exchanges of a thread must not mix with those of the steps; on the CPU, where the copy is.
        self._group = distributed.new_cpu_group() if learner.is_sharded else None
        self._stager: DefaultStager | None = None

    def start(self, step: int, state: Mapping[str, Any]) -> None:
        """Begins the checkpoint of `step`; `state`: see `checkpoint.Draft`. The one before must be finished."""
        assert self._job is None, "a checkpoint is being written"
        if self._learner.is_sharded:
            self._job = self._start_shards(step, state)
        elif distributed.is_main():
            self._job = self._thread.submit(self._writing(step, state))
        else:
            self._job = Future()
            self._job.set_result(None)

    def finish(self) -> Path | None:
        """Waits for the checkpoint and returns its folder; None if none was begun. Raises NoSpace on every process."""
        self.wait()
        job, self._job = self._job, None
        return None if job is None else distributed.on_main(job.result)

    def wait(self) -> None:
        """Waits for this process's part of a checkpoint that is being written, whether or not it succeeds."""
        if self._job is not None:
            wait([self._job])

    def _writing(self, step: int, state: Mapping[str, Any]) -> Callable[[], Path]:
        copies = self._copying() if self._background else None
        tensors = {} if copies is not None else self._learner.tensors()

        return lambda: self._write(step, tensors if copies is None else copies.result(), state)

    def write(self, step: int, state: Mapping[str, Any]) -> Path:
        """Writes a checkpoint that is not sharded in the thread that calls this; no other may be being written."""
        return self._write(step, self._learner.tensors(), state)

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        path = checkpoint.write_checkpoint(self._root, step, tensors, state, self._keep)
        checkpoint.publish(path, WEIGHTS, self._run_dir)
        return path

    def _copying(self) -> "Future[Any]":
        """Begins to copy the tensors in the thread; the learner waits for the copy before it changes them."""
        tensors = self._learner.tensors()
        copies = self._thread.submit(self._copies().stage, tensors)
        if self._learner.device.type == "cpu":
            self._learner.copying = copies
        else:
            wait([copies])
        return copies

    def _start_shards(self, step: int, state: Mapping[str, Any]) -> "Future[Path | None]":
        tensors = self._learner.tensors()
        size = sum(map(checkpoint.num_bytes, tensors.values()))
        draft = distributed.on_main(lambda: Draft.begin(self._root, step, size))
        written = write_shards(draft.folder, tensors, self._group, self._copies() if self._background else None)

        def complete() -> Path:
            with draft.removed_on_error():
                written()
                return draft.complete(state, self._keep)

        def take_part() -> Path:
            written()
            return checkpoint.step_folder(self._root, step)

        return self._thread.submit(complete if distributed.is_main() else take_part)

    def _copies(self) -> "DefaultStager":
        """Copies tensors to host memory, the same at each save."""
        if self._stager is None:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            on_gpu = self._learner.device.type == "cuda"
            self._stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu))
        return self._stager


def write_shards(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    group: dist.ProcessGroup | None,
    stager: "DefaultStager | None",
) -> Callable[[], None]:
    """Begins to write each process's rows of the tensors to a file in `folder`; the result waits for all processes.

    stager: copies the tensors, which are then written by a thread; None: they are written before the result is called.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save, save
    from torch.distributed.checkpoint.api import CheckpointException

    named = _named(tensors)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    upload: Future[Any] | None = None
    if stager is not None:
        response = async_save(named, storage_writer=writer, process_group=group, async_stager=stager)
        assert isinstance(response, Future)  # this stager has copied when it returns
        upload = response

    def written() -> None:
        try:
            if upload is not None:
                upload.result()
            else:
                save(named, storage_writer=writer, process_group=group)
        except CheckpointException as error:  # an error of each failing process; not an Exception
            raise next(problem for problem, _ in error.failures.values()) from error

    return written


def _named(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors by `part/name`; those that share their memory, as the buffers of model and average, become copies."""
    named, storages = {}, set()
    for part, values in tensors.items():
        for name, tensor in values.items():
            storage = local(tensor).untyped_storage().data_ptr()
            named[f"{part}/{name}"] = tensor.clone() if storage in storages else tensor
            storages.add(storage)
    return named
