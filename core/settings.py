"""Settings: nested mappings read from YAML with `extends:`, merged, overridden by key=value, and validated by `build`.

Recipes, protocols, ablation grids, the papers' tables and overrides on the command line are read here, in one dialect:
YAML 1.2 with JSON's numbers, and `<<` for merging. `no`, `on`, `12:30`, `010` and `2024-01-01` are texts, `1e-4` is a
number, and a repeated key is an error.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from crossflow.core.errors import UserError, unknown_name
from crossflow.core.recipes import RECIPE_FOLDERS, RECIPES

C = TypeVar("C", bound=BaseModel)

SUFFIXES = (".yaml", ".yml")


def shipped(folder: Path = RECIPES) -> dict[str, Path]:
    """The YAML files of a shipped folder by name (`t2i_small`); a leading _ marks files that only others extend.

    The recipes of tasks registered by other packages count as shipped.
    """
    folders = RECIPE_FOLDERS if folder == RECIPES else [folder]
    paths = {path.stem: path for place in folders for path in place.glob("[!_]*.yaml")}
    return dict(sorted(paths.items()))


def read(source: str | Path, folder: Path = RECIPES, kind: str = "recipe") -> dict[str, Any]:
    """The settings of a YAML file merged over the files that it extends; not validated.

    source: a name shipped in `folder`, a file, or a run directory. `extends: NAME` takes the file NAME or NAME.yaml
    beside the extending file, else the one shipped in `folder`. `kind` names the files in messages.
    Raises UserError for a file that is missing, unreadable, not a mapping, or extends itself.
    """
    path = Path(source)
    if path.is_dir() and (path / "config.yaml").is_file():
        path = path / "config.yaml"
    if not path.is_file():
        names = shipped(folder)
        if str(source) not in names:
            if path.suffix in SUFFIXES or len(path.parts) > 1:
                raise UserError(f"The {kind} file {source} does not exist. Give a file or a shipped name: "
                                f"{', '.join(names)}.")  # fmt: skip
            raise unknown_name(kind, str(source), names)
        path = names[str(source)]
    return _read_chain(path, folder, kind, ())


def _read_chain(path: Path, folder: Path, kind: str, extending: tuple[Path, ...]) -> dict[str, Any]:
    """As `read`; `extending`: the files that lead here by `extends:`."""
    if path.resolve() in extending:
        chain = " -> ".join(file.name for file in (*extending, path))
        raise UserError(f"The {kind} {extending[0]} extends itself: {chain}.")
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds {type(settings).__name__}, expected a mapping of settings.")
    base = settings.pop("extends", None)
    if base is None:
        return settings
    extending = (*extending, path.resolve())
    candidates = [path.parent / str(base), path.parent / f"{base}.yaml", folder / f"{base}.yaml"]
    # A file may extend the shipped one of the same name.
    candidates = [file for file in candidates if file.is_file() and file.resolve() != path.resolve()] or candidates
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise UserError(
            f"{path} extends {str(base)!r}, which is neither a file beside it nor a shipped {kind}: "
            f"{', '.join(shipped(folder))}."
        )
    return merge(_read_chain(file, folder, kind, extending), settings)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises UserError for a file that is missing or unreadable."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text; `name` stands for it in the UserError of a malformed one."""
    try:
        return copy.deepcopy(_parsed(text))
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error


@lru_cache(maxsize=512)
def _parsed(text: str) -> Any:
    """The value of a YAML text, kept: a command reads the same files several times, and parsing takes milliseconds."""
    return yaml.load(text, _Loader)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the settings of `over` laid on top, section by section."""
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted path: `{"train": {"lr": 1}}` -> `{"train.lr": 1}`; an empty section stays a value."""
    return dict(_leaves(settings, ""))


def _leaves(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`["train.steps=10", "seed=1"]` -> nested settings; values are read as in a recipe. Raises UserError."""
    settings: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise UserError(f"{override!r} is not an override. Write key=value, for example train.steps=500.")
        value = parse_yaml(text, f"The value of {override!r}")
        for part in reversed(name.split(".")):
            value = {part: value}
        settings = merge(settings, value)
    return settings


def build(kind: type[C], settings: Mapping[str, Any]) -> C:
    """Validates `settings` as a `kind`. Raises UserError that names each wrong field, its value and what is valid."""
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        raise UserError(" ".join(_explain(kind, problem) for problem in error.errors())) from error


def _explain(kind: type[BaseModel], problem: Mapping[str, Any]) -> str:
    """One of pydantic's errors as a sentence."""
    location: Sequence[str | int] = problem["loc"]
    name = ".".join(map(str, location))
    if problem["type"] == "extra_forbidden":
        prefix = "".join(f"{part}." for part in location[:-1])
        namesakes = [repr(path) for path in _paths(kind) if path.endswith(f".{location[-1]}")]
        if namesakes:
            return f"Unknown setting {name!r}. Did you mean {' or '.join(namesakes)}?"
        return str(unknown_name("setting", name, [prefix + field for field in _fields_at(kind, location[:-1])]))
    if problem["type"] == "missing":
        return f"The setting {name!r} is missing."
    reason = problem["msg"]
    if problem["type"] == "value_error":
        reason = str(problem["ctx"]["error"])  # without pydantic's "Value error, "
        if isinstance(problem["input"], Mapping | BaseModel):
            return reason  # from a validator of a whole section; its sentence names the settings
    return f"The setting {name} = {problem['input']!r} is invalid: {reason.removesuffix('.')}."


def _fields_at(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The fields of the section at `location`; none where sections are not named by fields (lists, mappings)."""
    for part in location:
        field = kind.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        kind = field.annotation
    return list(kind.model_fields)


def _paths(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted paths of all settings of `kind`."""
    paths = []
    for name, field in kind.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            paths += _paths(section, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def dump(config: BaseModel) -> str:
    """The complete configuration as YAML that means the same to readers of YAML 1.1 and 1.2."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Reads plain values as described in the module's docstring; the library's own rules are those of YAML 1.1."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """As in the library, except that repeated keys are an error; the library silently keeps the last."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if any((key.tag, key.value) == (other.tag, other.value) for other in keys[:number]):
                raise yaml.composer.ComposerError(
                    "while reading a mapping", node.start_mark, f"the key {key.value!r} is repeated", key.start_mark
                )
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `_Loader` or a reader of YAML 1.1 would read as another type."""


for _kind, _pattern, _first in (
    ("merge", r"<<", "<"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+.0123456789"),
):
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))
