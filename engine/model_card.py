"""The README.md of a published run: metadata of the hub (licence, base model, scores as model-index), and a page.

Everything in it is read from the run directory; what only its author knows (licence, base model, a text) is in `About`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crossflow.core.settings import flat
from crossflow.engine.describe import Description, Measurement
from crossflow.tasks import task_class

LIBRARY = "crossflow-toolkit"
HUB_SOURCES = ("text.encoder", "codec.source", "tower.source")
"""Settings that name public networks, by hub id."""


@dataclass(frozen=True)
class About:
    """What a run directory does not say about a model."""

    license: str | None = None
    """The hub's name of a licence: mit, apache-2.0, cc-by-4.0, ..."""
    base_model: str | None = None
    """Hub id of the model that this one was made from."""
    title: str | None = None
    """By default the name of the folder or repository."""
    text: str = ""
    """A paragraph under the title, in Markdown."""


def model_card(run: Description, about: About, pictures: Sequence[str] = ()) -> str:
    """The text of README.md. pictures: files in the published folder that are shown."""
    title = about.title or run.folder.resolve().name
    parts = [
        f"# {title}",
        about.text,
        _summary(run),
        *(f"![Outputs: {Path(name).stem}]({name})" for name in pictures),
        _use(run, title),
        _scores(run.measurements),
        _training(run),
        _limits(run),
    ]
    return f"---\n{metadata(run, about, title)}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def metadata(run: Description, about: About, title: str) -> str:
    """The YAML block of the card, with one result of the model-index for each score of a headline."""
    from huggingface_hub import EvalResult, ModelCardData

    tag = task_class(run.config.task).hub_tag
    results = [
        EvalResult(
            task_type=tag or run.config.task,
            dataset_type=each.data.partition(":")[0],
            dataset_name=f"{each.data} ({each.title})",
            dataset_split=each.split,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for each in run.measurements
        for name, value in each.leading().items()
    ]
    data = ModelCardData(
        language=None,
        license=about.license,
        library_name=LIBRARY,
        base_model=about.base_model,
        tags=["crossflow", "flow-matching", run.config.task],
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=title if results else None,
        eval_results=results or None,
        pipeline_tag=tag,
    )
    return data.to_yaml().rstrip()


def _summary(run: Description) -> str:
    config = run.config
    size = f"{sum(run.num_parameters.values()) / 1e6:.2f}M parameters"
    sources = [source for source in named_sources(run).values() if source]
    with_networks = f", with the frozen networks {', '.join(sources)}" if sources else ""
    return (
        f"A noise-free cross-modal flow model for the task `{config.task}`: a {config.source.kind} source encoder and "
        f"a {config.backbone.name} backbone, {size}{with_networks}."
    )


def named_sources(run: Description) -> dict[str, str | None]:
    """The public networks that the run's settings name, by setting."""
    settings = flat(run.config.model_dump(mode="json"))
    return {name: settings[name] for name in HUB_SOURCES if isinstance(settings.get(name), str)}


def _use(run: Description, title: str) -> str:
    is_text = task_class(run.config.task).input_kind == "text"
    example = '"a red cube"' if is_text else '"photo.jpg"'
    option = '--prompt "a red cube"' if is_text else "--input photo.jpg"
    return (
        "## Use\n\n"
        f"```python\nimport crossflow  # the package {LIBRARY}\n\n"
        f'pipe = crossflow.load("{title}")\noutputs = pipe({example}, seed=0)\n```\n\n'
        f"```bash\ncrossflow sample --checkpoint {title} {option}\n```"
    )


def _scores(measurements: Sequence[Measurement]) -> str:
    if not measurements:
        return ""
    rows = ["| data | protocol | score | value | 95 % interval | items |", "|---|---|---|---|---|---|"]
    for each in measurements:
        for name, value in each.leading().items():
            low, high = each.intervals.get(name) or (None, None)
            interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
            items = "" if each.num_items is None else str(each.num_items)
            rows.append(f"| {each.data} ({each.split}) | {each.title} | {name} | {value:.4g} | {interval} | {items} |")
    return "## Scores\n\n" + "\n".join(rows)


def _training(run: Description) -> str:
    data, versions = run.manifest.get("data", {}), run.manifest.get("versions", {})
    lines = [
        f"- {run.step or run.config.train.steps} steps of {run.config.train.batch_size} on `{run.config.data.train}`"
        + (f", {data['num_items']} items, fingerprint `{data['fingerprint']}`" if "fingerprint" in data else ""),
        f"- recipe `{run.recipe}`" + (", changed: " * bool(run.differences)) + _changed(run) if run.recipe else "",
        f"- trained by {LIBRARY} {versions[LIBRARY]}, torch {versions.get('torch')}" if LIBRARY in versions else "",
        "- everything else: `config.yaml` and `manifest.json`",
    ]
    return "## Training\n\n" + "\n".join(line for line in lines if line)


def _changed(run: Description, most: int = 8) -> str:
    settings = [f"`{name}={value}`" for name, (_, value) in run.differences.items()]
    more = f" and {len(settings) - most} more" if len(settings) > most else ""
    return ", ".join(settings[:most]) + more


def _limits(run: Description) -> str:
    return (
        "## Intended use and limits\n\n"
        f"Made for research on flow models. It knows what its training data (`{run.config.data.train}`) show and "
        "little else, and it repeats their biases; check outputs before anybody relies on them."
    )
