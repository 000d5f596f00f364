"""`crossflow.load(DIR)` for any run: the pipeline of its task, or, of a joint run, one that does all of its tasks."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.joint import share_body
from crossflow.core.settings import read
from crossflow.core.weights import BACKWARDS, MEMBERS
from crossflow.engine import sample
from crossflow.engine.outputs import Outputs
from crossflow.engine.sample import Opening, Pipeline
from crossflow.networks.hub import Access, run_folder
from crossflow.tasks import task_class, tasks_of


def load(
    source: str | Path, *, task: str | None = None, revision: str | None = None, **options: Unpack[Opening]
) -> "Pipeline | JointPipeline":
    """The pipeline of a run directory, or of a hub repository that holds one.

    task: of a joint run; None: a `JointPipeline` of all of them. The other arguments are those of `engine.sample.load`.
    Raises UserError as it does, and for a task that the run does not have.
    """
    access = {name: options[name] for name in Access.__annotations__ if name in options}  # type: ignore[literal-required]
    folder = run_folder(source, revision, **access)
    names = joint_tasks(folder)
    if not names:
        if task is not None and task not in (own := tasks_of(read(folder).get("task", ""))):
            raise UserError(f"{source} is a run of the task {', '.join(own)}, not of {task}.")
        return sample.load(folder, **options)
    if task is not None:
        return sample.load(member(folder, task), **options)
    return JointPipeline({name: sample.load(member(folder, name), **options) for name in names})


def joint_tasks(folder: Path) -> tuple[str, ...]:
    """The tasks of a joint run directory; none for any other."""
    return tasks_of(read(folder).get("task", "")) if (folder / MEMBERS).is_dir() else ()


def task_folders(folder: Path) -> list[Path]:
    """The folders of the tasks of a joint run; of any other folder itself."""
    return [member(folder, name) for name in joint_tasks(folder)] or [folder]


def member(folder: Path, task: str) -> Path:
    """The folder of a task in a joint run directory. Raises UserError with near names for one that it does not have."""
    names = joint_tasks(folder)
    if task not in names:
        raise unknown_name(f"task of {folder}", task, names)
    is_backwards = task in read(folder).get(BACKWARDS, {})
    return folder / (BACKWARDS if is_backwards else MEMBERS) / task


def task_for(folder: Path, kind: str | None = None) -> str:
    """The task that is meant where none is named: the only one, or the only one that takes inputs of the kind.

    kind: text | image. Raises UserError where several are possible.
    """
    names = joint_tasks(folder)
    possible = [name for name in names if kind is None or task_class(name).input_kind == kind]
    if len(possible) == 1:
        return possible[0]
    takes = {None: "", "text": " from prompts", "image": " from pictures"}[kind]
    listed = " or ".join(f"--task {name}" for name in possible or names)
    some = f"can do {', '.join(possible)}{takes}" if possible else f"does nothing{takes}, but {', '.join(names)}"
    raise UserError(f"The joint run {folder} {some}: say which by {listed} (from Python task=...).")


class JointPipeline:
    """The tasks of a joint run, whose models share their blocks in memory.

        pipe = crossflow.load("runs/joint_tiny")
        pipe.tasks                                     ('t2i', 'caption', 'depth', 'sr')
        picture = pipe("a red cube")[0]                the only task that takes prompts
        depth = pipe(picture, task="depth")[0]
        pipe["depth"].save("runs/depth")               an ordinary run directory of one task

    `pipe[TASK]` is the `Pipeline` of a task, with everything that such a pipeline can do.
    """

    def __init__(self, members: Mapping[str, Pipeline]) -> None:
        self._members = dict(members)
        # A task that runs the flow of another backwards has a copy of it, which is no body of its own.
        models = {name: pipe.model for name, pipe in members.items() if hasattr(pipe.model.backbone, "body")}
        share_body(models)

    def __repr__(self) -> str:
        return f"JointPipeline({', '.join(map(repr, self._members.values()))})"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(self._members)

    def __getitem__(self, task: str) -> Pipeline:
        """The pipeline of a task. Raises UserError with near names for one that the run does not have."""
        if task not in self._members:
            raise unknown_name("task of this run", task, self.tasks)
        return self._members[task]

    def __call__(
        self,
        inputs: object,
        *,
        task: str | None = None,
        num: int = 1,
        seed: int = 0,
        output_type: str = "pil",
        **settings: object,
    ) -> Outputs:
        """The outputs of a task; the arguments are those of `Pipeline.__call__`, and `pipe[TASK]` takes the others.

        task: may be left out where one task takes such inputs. Raises UserError where several do.
        """
        pipe, fields = self[task or self._task_of(inputs)], dict[str, Any](settings)
        return pipe(inputs, num=num, seed=seed, output_type=output_type, **fields)

    def _task_of(self, inputs: object) -> str:
        """The task that takes the inputs: texts that name no file are prompts, everything else is a picture."""
        values: Sequence[object] = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        texts = [name for name, pipe in self._members.items() if pipe.task.input_kind == "text"]
        is_text = all(isinstance(value, str) and not os.path.isfile(value) for value in values)
        possible = texts if is_text and texts else [name for name in self._members if name not in texts]
        if len(possible) == 1:
            return possible[0]
        what = "prompts" if is_text and texts else "pictures"
        named = ", ".join(f"task={name!r}" for name in possible or self._members)
        raise UserError(f"Of this run's tasks {', '.join(possible) or 'none'} take(s) {what}: say which by {named}.")

    def to(self, device: str | torch.device) -> "JointPipeline":
        """Moves everything to a device; returns self."""
        for pipe in self._members.values():
            pipe.to(device)
        return self
