"""Pieces that several tabs are made of: inputs, settings of sampling, buttons, and results."""

import html
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from crossflow.demo.jobs import TURN, Jobs
from crossflow.demo.limits import MAX_GUIDANCE, MAX_SEED, Limits, choice, number, whole
from crossflow.demo.models import Model, Models, metadata
from crossflow.engine.outputs import Outputs

PRIVATE = {"api_visibility": "private"}
"""Of events that are part of the page and no endpoint of the API."""


@dataclass(frozen=True)
class Site:
    """What every tab is built from. cache: where files for visitors are written."""

    models: Models
    cache: Path
    runs: Path | None = None
    limits: Limits = field(default_factory=Limits)
    jobs: Jobs = field(default_factory=Jobs)


def upload(label: str, *, height: int = 160) -> gr.Image:
    """A field for a picture, whose value is the path of the uploaded file. To hide it, hide what it lies in."""
    field = gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=height, buttons=[],
        elem_classes=["upload"], placeholder="Drop a picture here\nor click to choose one",
    )  # fmt: skip
    # gradio itself would open the file, and answer a broken one without a sentence. By then it has checked that the
    # path is that of an upload. A subclass would make gradio write a stub file beside this one.
    field.preprocess = lambda payload: None if payload is None else payload.path
    return field


def lead(text: str) -> gr.HTML:
    """A quiet paragraph at the head of a tab."""
    return gr.HTML(lead_text(text), elem_classes=["lead"])


def lead_text(text: str) -> str:
    """Its content."""
    return f"<p>{html.escape(text)}</p>"


def heading(text: str, *, visible: bool = True) -> gr.HTML:
    """The heading of a result."""
    return gr.HTML(f"<h3>{html.escape(text)}</h3>", visible=visible, elem_classes=["heading"])


def prompt_box(label: str, limits: Limits, value: str = "", *, visible: bool = True) -> gr.Textbox:
    """A line for a prompt."""
    return gr.Textbox(value, label=label, max_length=limits.prompt, lines=1, max_lines=3, visible=visible)


def model_choice(models: Sequence[Model], label: str = "Model") -> gr.Dropdown:
    """The choice of a model, shown where there is one."""
    names = [model.name for model in models]
    return gr.Dropdown(names, value=names[0], label=label, visible=len(names) > 1, filterable=False)


# -- settings


@dataclass(frozen=True)
class Sampling:
    """The fields of how an output is sampled."""

    steps: gr.Slider
    guidance: gr.Slider
    solver: gr.Dropdown
    seed: gr.Number

    @classmethod
    def form(cls, models: Sequence[Model], limits: Limits) -> "Sampling":
        """The fields, with the settings of the first model."""
        settings = models[0].pipe.settings
        solvers = list(dict.fromkeys(solver for model in models for solver in model.solvers))
        solver = settings.solver if settings.solver in solvers else solvers[0]
        with gr.Row():
            steps = gr.Slider(1, limits.steps, value=min(settings.steps, limits.steps), step=1, label="Steps")
            guidance = gr.Slider(0, MAX_GUIDANCE, value=settings.guidance, step=0.1, label="Guidance")
        with gr.Row():
            chosen = gr.Dropdown(solvers, value=solver, label="Solver", filterable=False)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
        return cls(steps, guidance, chosen, seed)

    @property
    def fields(self) -> list[Any]:
        """In the order of `settings`, the seed last."""
        return [self.steps, self.guidance, self.solver, self.seed]

    def follow(self, choice_of_model: gr.Dropdown, models: Models, limits: Limits) -> None:
        """Takes the settings of a model when it is chosen."""

        def own(name: str) -> list[object]:
            settings, solvers = models.get(name).pipe.settings, models.get(name).solvers
            solver = settings.solver if settings.solver in solvers else solvers[0]
            return [min(settings.steps, limits.steps), settings.guidance, solver]

        outputs = [self.steps, self.guidance, self.solver]
        choice_of_model.change(own, choice_of_model, outputs, queue=False, show_progress="hidden", **PRIVATE)


def settings(model: Model, limits: Limits, steps: object, guidance: object, solver: object) -> dict[str, Any]:
    """Fields of SampleConfig, checked. Raises UserError for values out of bounds."""
    return {
        "steps": whole(steps, "Steps", 1, limits.steps),
        "guidance": number(guidance, "Guidance", 0, MAX_GUIDANCE),
        "solver": choice(solver, "solver", model.solvers),
    }


def seed_of(value: object) -> int:
    """A seed, checked."""
    return whole(value, "The seed", 0, MAX_SEED)


# -- a source of any model: a prompt or a picture


@dataclass(frozen=True)
class Source:
    """A prompt and a picture, of which the chosen model's kind is shown."""

    prompt: gr.Textbox
    picture: gr.Image
    holder: gr.Column
    """Of the picture."""

    @classmethod
    def form(cls, label: str, models: Sequence[Model], limits: Limits, value: str = "") -> "Source":
        """The fields, as the first model needs them."""
        prompt = prompt_box(label, limits, value, visible=models[0].takes_text)
        with gr.Column(visible=not models[0].takes_text) as holder:
            return cls(prompt, upload(label), holder)

    @property
    def fields(self) -> list[Any]:
        """Prompt and picture."""
        return [self.prompt, self.picture]

    def follow(self, choice_of_model: gr.Dropdown, models: Models) -> None:
        """Shows the field of the chosen model's kind."""

        def kind(name: str) -> list[object]:
            takes_text = models.get(name).takes_text
            return [gr.update(visible=takes_text), gr.update(visible=not takes_text)]

        shown = [self.prompt, self.holder]
        choice_of_model.change(kind, choice_of_model, shown, queue=False, show_progress="hidden", **PRIVATE)


def read_source(model: Model, limits: Limits, prompt: object, picture: object, name: str) -> Any:
    """The input of a model: a checked prompt, or a picture of bounded size."""
    if model.takes_text:
        return limits.text(prompt, name)
    return limits.fitting(model.pipe, limits.picture(picture, name))


def read_optional(model: Model, limits: Limits, prompt: object, picture: object, name: str) -> Any:
    """As `read_source`; None for a field that is left empty."""
    left_empty = not prompt if model.takes_text else picture is None
    return None if left_empty else read_source(model, limits, prompt, picture, name)


# -- buttons and results


@dataclass(frozen=True)
class Buttons:
    """A button that computes, and one that cancels it."""

    run: gr.Button
    cancel: gr.Button

    @classmethod
    def form(cls, label: str, id: str) -> "Buttons":
        """The buttons; id: of the first in the page."""
        with gr.Row():
            run = gr.Button(label, variant="primary", elem_id=id, scale=3)
            return cls(run, gr.Button("Cancel", variant="secondary", scale=1, min_width=90))

    def start(
        self,
        site: Site,
        endpoint: Callable[..., Any],
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        *,
        name: str,
        about: str,
        enter: Sequence[gr.Textbox] = (),
    ) -> None:
        """Lets the button, and the Enter key in some fields, compute an endpoint, /name of the API."""
        triggers = [self.run.click, *(field.submit for field in enter)]
        event = gr.on(
            triggers, endpoint, list(inputs), list(outputs), api_name=name, api_description=about,
            concurrency_limit=1, concurrency_id=TURN, show_progress="full", show_progress_on=outputs[0],
        )  # fmt: skip
        # A running computation first: gradio itself waits for its end, and removes what is still in the queue.
        stopped = self.cancel.click(site.jobs.cancel, None, None, queue=False, show_progress="hidden", **PRIVATE)
        stopped.then(None, None, None, cancels=[event], queue=False, **PRIVATE)


def gallery(label: str, models: Sequence[Model], *, columns: int = 4, visible: bool = True) -> gr.Gallery:
    """Pictures with a line under each, without loss."""
    classes = ["result", *["pixels"] * all(model.is_small for model in models), *["strip"] * (columns > 4)]
    return gr.Gallery(
        label=label, show_label=False, format="png", columns=columns, height="auto", object_fit="contain",
        interactive=False, visible=visible, elem_classes=classes,
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def text_result(label: str, *, visible: bool = True) -> gr.Textbox:
    """Lines of text that a model wrote."""
    return gr.Textbox(
        label=label, lines=3, max_lines=16, interactive=False, visible=visible,
        placeholder="Results appear here.", elem_classes=["words"], buttons=["copy"],
    )  # fmt: skip


def note_line() -> gr.Textbox:
    """A quiet line below a result."""
    return gr.Textbox(
        show_label=False, container=False, interactive=False, lines=1, max_lines=6, elem_classes=["note"],
        label="Note",
    )  # fmt: skip


def pictures(model: Model, outputs: Outputs, labels: Sequence[str], **details: object) -> list[tuple[Any, str]]:
    """Outputs as pictures with labels and, in their files, how they were made; empty for texts."""
    if model.makes == "text" or not len(outputs):
        return []
    shown = []
    for pixels, label in zip(outputs.render(outputs.raw), labels, strict=True):
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        picture.info.update(metadata(model, details))
        shown.append((picture, label))
    return shown


def texts(model: Model, outputs: Outputs, labels: Sequence[str] = ()) -> str:
    """Texts line by line, behind their labels; empty for pictures."""
    if model.makes != "text":
        return ""
    names = [f"{label}: " for label in labels] or [""] * len(outputs)
    return "\n".join(f"{name}{text}" for name, text in zip(names, outputs.captions, strict=True))


def note(model: Model, started: float, values: Sequence[object], **about: object) -> str:
    """How long it took and by which settings, and words that the model does not know."""
    words = dict.fromkeys(word for value in values for word in model.pipe.task.unknown_words(value))
    unknown = f" The model was trained without these words: {', '.join(list(words)[:12])}." if words else ""
    facts = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in about.items()
    )
    return f"{time.monotonic() - started:.1f} s with {model.name}: {facts}.{unknown}"


def facts_of(chosen: Mapping[str, Any], seed: int) -> dict[str, object]:
    """What a note and a picture's file say about the sampling."""
    return {**chosen, "seed": seed}
