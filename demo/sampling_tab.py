"""A task's own tab: an input, its outputs."""

import time
from collections.abc import Sequence
from typing import Any

import gradio as gr

from crossflow.core.progress import Progress
from crossflow.demo import parts
from crossflow.demo.limits import whole
from crossflow.demo.models import Model, examples
from crossflow.demo.parts import Buttons, Sampling, Site

BUTTONS = {"text": "Describe", "picture": "Generate", "metres": "Estimate depth"}


def build(site: Site, models: Sequence[Model]) -> None:
    """The tab of the models of a task; its endpoint has the task's name."""
    first, limits = models[0], site.limits
    with gr.Tab(first.title, id=first.task), gr.Row(elem_classes=["work"]):
        with gr.Column(scale=2, min_width=300):
            facts = parts.lead(first.facts)
            shown = examples(first, site.cache)
            prompt = shown[0] if shown else ""
            source: Any = (
                parts.prompt_box("Prompt", limits, prompt) if first.takes_text else parts.upload("Picture", height=240)
            )
            if shown:
                gr.Examples([[each] for each in shown], source, label="Examples", api_visibility="private")
            model = parts.model_choice(models)
            buttons = Buttons.form(BUTTONS[first.makes], f"run-{first.task}")
            with gr.Accordion("Settings", open=False):
                num = gr.Slider(1, limits.num, value=1, step=1, label="Outputs")
                sampling = Sampling.form(models, limits)
                sampling.follow(model, site.models, limits)
            model.change(
                lambda name: parts.lead_text(site.models.get(name).facts), model, facts, queue=False,
                show_progress="hidden", **parts.PRIVATE,
            )  # fmt: skip
        with gr.Column(scale=3, min_width=300):
            is_text = first.makes == "text"
            result = parts.text_result("Captions") if is_text else parts.gallery("Result", models, columns=2)
            line = parts.note_line()
    inputs = [source, model, num, *sampling.fields]
    buttons.start(
        site, _handler(site, first), inputs, [result, line], name=first.task,
        about=f"{first.title}: outputs of an input, and a line on how they were made.",
        enter=[source] if first.takes_text else [],
    )  # fmt: skip


def _handler(site: Site, first: Model) -> Any:
    """The function behind the button; the first field has the name of what the task takes."""
    limits, models = site.limits, [model for model in site.models.all if model.task == first.task]

    def run(on_step: Progress, entered: object, model: str, num: float, *, chosen: Sequence[object]) -> tuple[Any, str]:
        started, used = time.monotonic(), site.models.get(model)
        if used not in models:
            used = first
        is_text = used.takes_text
        value = parts.read_source(used, limits, entered, entered, "The prompt" if is_text else "The picture")
        settings, seed = parts.settings(used, limits, *chosen[:3]), parts.seed_of(chosen[3])
        outputs = used.pipe(value, num=whole(num, "Outputs", 1, limits.num), seed=seed, on_step=on_step, **settings)
        facts = parts.facts_of(settings, seed)
        facts |= {} if is_text else {"picture": f"{value.shape[1]} x {value.shape[0]}"}
        labels = [value if is_text else ""] * len(outputs)
        details = {**facts, "prompt": value} if is_text else facts
        is_written = used.makes == "text"
        shown = parts.texts(used, outputs) if is_written else parts.pictures(used, outputs, labels, **details)
        return shown, parts.note(used, started, [value] if is_text else [], **facts)

    @site.jobs.endpoint
    def of_prompt(
        on_step: Progress, prompt: str, model: str, num: float, steps: float, guidance: float, solver: str, seed: float
    ) -> tuple[Any, str]:
        return run(on_step, prompt, model, num, chosen=(steps, guidance, solver, seed))

    @site.jobs.endpoint
    def of_picture(
        on_step: Progress, picture: str, model: str, num: float, steps: float, guidance: float, solver: str, seed: float
    ) -> tuple[Any, str]:
        return run(on_step, picture, model, num, chosen=(steps, guidance, solver, seed))

    return of_prompt if first.takes_text else of_picture
