"""What an evaluation scores, made when it is needed: of a large set only one batch is in memory at a time."""

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossflow.benchmarks.evaluation.protocol import Protocol
from crossflow.core.errors import UserError
from crossflow.core.metrics import TaskMetric
from crossflow.data.dataset import Examples
from crossflow.data.item import Item
from crossflow.data.readers import READERS
from crossflow.data.resize import center_crop_resize
from crossflow.data.splits import SPLITS
from crossflow.tasks.base import Case, Task

KITTI_HEIGHT, KITTI_WIDTH = 352, 1216


class Cases(ABC):
    """Cases by number. Not every number has one: items can be bad, or too small to be scored; `bad` tells them."""

    spec: str
    split: str
    bad: dict[str, str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def at(self, numbers: Sequence[int]) -> list[tuple[int, Case]]:
        """The cases with these numbers that can be scored, each with its number."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Of the data that the cases are made from."""

    def __iter__(self) -> Iterator[Case]:
        """All of them, a few at a time."""
        for start in range(0, len(self), 16):
            for _, case in self.at(range(start, min(start + 16, len(self)))):
                yield case


class ReadyCases(Cases):
    """Cases that are small enough to be kept, such as prompts."""

    def __init__(self, cases: Sequence[Case], spec: str, split: str, fingerprint: str) -> None:
        self.cases, self.spec, self.split, self._fingerprint = list(cases), spec, split, fingerprint
        self.bad = {}

    def __len__(self) -> int:
        return len(self.cases)

    def at(self, numbers: Sequence[int]) -> list[tuple[int, Case]]:
        return [(number, self.cases[number]) for number in numbers]

    def fingerprint(self) -> str:
        return self._fingerprint


class ItemCases(Cases):
    """One case for each good item of a data set, read when it is asked for."""

    def __init__(self, examples: Examples, make: Callable[[Item], Case | None]) -> None:
        self.examples, self.make = examples, make
        self.spec, self.split = examples.reader.spec, examples.reader.split
        self.numbers = {id: number for number, id in enumerate(examples.reader.ids)}
        self.left_out: dict[str, str] = {}

    @property
    def bad(self) -> dict[str, str]:  # type: ignore[override]
        return {**self.examples.bad, **self.left_out}

    def __len__(self) -> int:
        return len(self.examples)

    def at(self, numbers: Sequence[int]) -> list[tuple[int, Case]]:
        found = []
        for item in self.examples.items_at(numbers):
            case = self.make(item)
            if case is None:
                self.left_out[item.id] = "too small to be scored"
            else:
                found.append((self.numbers[item.id], case))
        return found

    def fingerprint(self) -> str:
        return self.examples.reader.fingerprint()


@dataclass(frozen=True)
class Plan:
    """Cases, how they are scored, and the trivial output that stands beside the model's, if there is one."""

    cases: Cases
    metric: Callable[[], TaskMetric]
    examples: Examples | None = None
    trivial: Callable[[Case], Any] | None = None


def plan(
    task: Task, protocol: Protocol | None, spec: str | None, split: str, num: int, seed: int, networks: Any
) -> Plan:
    """What is scored and how: by a protocol, or by the task itself. `networks`: those of the protocol, opened.

    Raises UserError when data or run do not fit the protocol.
    """
    task = _with_seed_0(task)
    if protocol is None:
        return _by_task(task, spec, split, num)
    if protocol.task != task.name:
        raise UserError(f"The protocol {protocol.name} is one for {protocol.task} runs; this is a {task.name} run.")
    spec = spec or protocol.data
    if spec is None:
        raise UserError(
            f"The protocol {protocol.name} needs its data: give --data with {protocol.layout}. {protocol.title}."
        )
    if protocol.text.prompts == "geneval":
        return _geneval(protocol, spec, num, networks)
    limit = min(num, protocol.choose) if protocol.choose is not None else num
    if protocol.text.prompts == "scenes":
        found = _by_task(task, spec, split, limit)
        if not isinstance(found.cases, ReadyCases):
            raise UserError(f"The protocol {protocol.name} asks about embedded scenes; {spec} holds none.")
        return Plan(found.cases, lambda: task.metric(True), found.examples)
    examples = task.dataset(split, with_options(spec, protocol.reader), limit=limit)
    builders = {"depth": _depth, "sr": _sr, "t2i": _text, "caption": _caption}
    return builders[task.name](task, protocol, examples, networks)


def _with_seed_0(task: Task) -> Task:
    """Which items and prompts are scored must not depend on the seed that a run was trained with."""
    copied = copy.copy(task)
    copied.config = task.config.model_copy(update={"seed": 0})
    return copied


def with_options(spec: str, wanted: Mapping[str, str]) -> str:
    """The spec with those of the wanted settings that its format knows and that it does not set itself."""
    prefix, colon, _ = spec.partition(":")
    if not colon or prefix not in READERS.names():
        return spec
    place, at, split = spec.rpartition("@")
    place, at, split = (place, at, split) if split in SPLITS else (spec, "", "")
    place, _, given = place.partition("?")
    names = {one.partition("=")[0] for one in given.split("&")}
    known = READERS.get(prefix).options
    added = [f"{name}={value}" for name, value in wanted.items() if name in known and name not in names]
    if not added:
        return spec
    return f"{place}?{'&'.join([*filter(None, [given]), *added])}{at}{split}"


def _by_task(task: Task, spec: str | None, split: str, num: int) -> Plan:
    examples = task.dataset(split, spec, limit=num)
    if task.name == "t2i" and "scene" in examples.reader.fields:  # prompts, which have no item behind them
        ready = task.cases(examples, num)
        cases: Cases = ReadyCases(ready, examples.reader.spec, examples.reader.split, examples.reader.fingerprint())
    else:
        cases = ItemCases(examples, task.case)
    return Plan(cases, lambda: task.metric(True), examples)


def _caption(task: Task, protocol: Protocol, examples: Examples, networks: Any) -> Plan:
    return Plan(ItemCases(examples, task.case), lambda: task.metric(True), examples)


def _text(task: Task, protocol: Protocol, examples: Examples, networks: Any) -> Plan:
    from crossflow.tasks.t2i.metric import T2IMetric

    clip = networks.clip if protocol.text.clip_score else None
    return Plan(ItemCases(examples, task.case), lambda: T2IMetric(clip=clip, seed=task.config.seed), examples)


def _depth(task: Task, protocol: Protocol, examples: Examples, networks: Any) -> Plan:
    from crossflow.tasks.depth.metric import DepthMetric

    rules = protocol.depth

    def make(item: Item) -> Case:
        assert item.image is not None
        assert item.depth is not None
        image, depth = item.image, item.depth
        if rules.picture == "kitti":
            image, depth = (bottom_centre(one, KITTI_HEIGHT, KITTI_WIDTH) for one in (image, depth))
        return Case(item.id, image, depth, item)

    def metric() -> TaskMetric:
        return DepthMetric(
            rules.alignment,
            space=rules.space,
            min_depth=rules.min_depth,
            max_depth=rules.max_depth,
            crop=rules.crop,
        )

    return Plan(ItemCases(examples, make), metric, examples)


def bottom_centre(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """The `height` x `width` pixels at the bottom, in the middle; what is smaller stays as it is."""
    top, left = max(0, array.shape[0] - height), max(0, array.shape[1] - width) // 2
    return array[top:, left : left + width]


def _sr(task: Task, protocol: Protocol, examples: Examples, networks: Any) -> Plan:
    from crossflow.tasks.sr.dataset import enlarge, reduce, to_multiple
    from crossflow.tasks.sr.metric import SrMetric

    rules, scale = protocol.sr, protocol.sr.scale
    own = task.config.sr.scale
    if own != scale:
        raise UserError(f"The protocol {protocol.name} enlarges {scale} times, this run {own} times (sr.scale).")
    shave = scale if rules.shave is None else rules.shave

    def make(item: Item) -> Case | None:
        assert item.image is not None
        sharp = to_multiple(item.image, scale)
        if rules.crop is not None:
            if min(item.image.shape[:2]) < rules.crop:
                return None
            sharp = center_crop_resize(item.image, rules.crop)
        if min(sharp.shape[:2]) < 11 + 2 * shave:
            return None
        return Case(item.id, reduce(sharp, scale), sharp, item)

    lpips = networks.lpips if "lpips" in protocol.networks else None
    return Plan(
        ItemCases(examples, make),
        lambda: SrMetric(scale=scale, shave=shave, lpips=lpips),
        examples,
        trivial=lambda case: enlarge(case.input, scale),
    )


def _geneval(protocol: Protocol, spec: str, num: int, networks: Any) -> Plan:
    from crossflow.tasks.t2i.geneval import GenEvalMetric, read_prompts

    path = Path(spec.removeprefix("geneval:")).expanduser()
    prompts = read_prompts(path)
    wanted = [one["class"] for prompt in prompts for one in [*prompt["include"], *prompt.get("exclude", [])]]
    networks.detector.expect(wanted)
    cases = [
        Case(f"{number:05d}/{k}", prompt["prompt"], prompt)
        for number, prompt in enumerate(prompts)
        for k in range(protocol.text.samples)
    ]
    digest = hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:32]
    ready = ReadyCases(cases[:num], spec, protocol.split, digest)
    return Plan(ready, lambda: GenEvalMetric(networks.detector, networks.colours))
