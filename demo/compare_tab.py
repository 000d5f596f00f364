"""The tab that puts models of a task beside each other: the same input, the same noise."""

import time
from collections.abc import Sequence
from typing import Any

import gradio as gr

from crossflow.core.errors import UserError
from crossflow.core.progress import Progress
from crossflow.demo import parts
from crossflow.demo.limits import whole
from crossflow.demo.models import Model, examples
from crossflow.demo.parts import Buttons, Site, Source


def comparable(site: Site) -> list[Model]:
    """The models of tasks that have at least two."""
    return [model for models in site.models.by_task.values() if len(models) > 1 for model in models]


def build(site: Site) -> None:
    """The tab, with the endpoint /compare."""
    models, limits = comparable(site), site.limits
    names, first = [model.name for model in models], models[0]
    others = [model.name for model in models[1:] if model.task == first.task]
    with gr.Tab("Side by side", id="compare"):
        parts.lead("The same input and the same noise, each model with its own settings.")
        with gr.Row(elem_classes=["work"]):
            with gr.Column(scale=2, min_width=300):
                with gr.Row():
                    left = gr.Dropdown(names, value=names[0], label="Left", filterable=False, min_width=120)
                    right = gr.Dropdown(names, value=others[0], label="Right", filterable=False, min_width=120)
                shown = examples(first, site.cache) if first.takes_text else []
                source = Source.form("Source", models, limits, shown[0] if shown else "")
                source.follow(left, site.models)
                num = gr.Slider(1, limits.num, value=2, step=1, label="Outputs")
                seed = gr.Number(0, label="Seed", precision=0)
                buttons = Buttons.form("Compare", "run-compare")
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    sides = [_side(side, models) for side in ("Left", "Right")]
                lines = parts.text_result("Captions", visible=any(model.makes == "text" for model in models))
                line = parts.note_line()
    buttons.start(
        site, _handler(site), [left, right, *source.fields, num, seed], [*sides, lines, line], name="compare",
        about="Outputs of two models of one task for the same input and noise.", enter=[source.prompt],
    )  # fmt: skip


def _side(name: str, models: Sequence[Model]) -> gr.Gallery:
    with gr.Column(min_width=140):
        parts.heading(name)
        return parts.gallery(name, models, columns=1)


def _handler(site: Site) -> Any:
    limits = site.limits

    @site.jobs.endpoint
    def compare(
        on_step: Progress, left: str, right: str, prompt: str, picture: str, num: float, seed: float
    ) -> tuple[Any, Any, str, str]:
        pair: Sequence[Model] = [site.models.get(left), site.models.get(right)]
        if pair[0].task != pair[1].task:
            raise UserError(
                f"{pair[0].name} ({pair[0].title}) and {pair[1].name} ({pair[1].title}) do different things: choose "
                "two models of one task."
            )
        started, count, key = time.monotonic(), whole(num, "Outputs", 1, limits.num), parts.seed_of(seed)
        value = parts.read_source(pair[0], limits, prompt, picture, "The source")
        outputs = [model.pipe(value, num=count, seed=key, on_step=on_step) for model in pair]
        names = [[f"{model.name}, {k}" for k in range(count)] for model in pair]
        together = list(zip(pair, outputs, names, strict=True))
        shown = [parts.pictures(*each, seed=key) for each in together]
        lines = "\n".join(filter(None, (parts.texts(*each) for each in together)))
        about: dict[str, object] = {"beside": pair[1].name, "seed": key}
        return shown[0], shown[1], lines, parts.note(pair[0], started, [], **about)

    return compare
