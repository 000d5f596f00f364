"""The tab of the latent tools: interpolation, arithmetic, inversion and edit."""

import time
from collections.abc import Sequence
from typing import Any

import gradio as gr

from crossflow.core.errors import UserError
from crossflow.core.progress import Progress
from crossflow.demo import parts
from crossflow.demo.limits import choice, number, whole
from crossflow.demo.models import Model, examples
from crossflow.demo.parts import PRIVATE, Buttons, Site, Source
from crossflow.engine import latents
from crossflow.engine.outputs import Outputs

KINDS = ["lerp", "slerp"]


def build(site: Site) -> None:
    """The tab, with the endpoints /interpolate, /arithmetic and /edit."""
    with gr.Tab("Latent space", id="latents"):
        parts.lead(
            "The source of these models is a latent with a meaning: one can walk between two, add and subtract "
            "them, and find the one from which a picture comes."
        )
        shown = examples(site.models.all[0], site.cache) if site.models.all[0].takes_text else []
        prompts = [*shown, "", ""][:2] if len(shown) > 1 else ["", ""]
        with gr.Tabs():
            with gr.Tab("Interpolate"):
                _interpolation(site, prompts)
            with gr.Tab("Add and subtract"):
                _arithmetic(site)
            with gr.Tab("Invert and edit"):
                _inversion(site)


def _results(site: Site, columns: int) -> tuple[gr.Gallery, gr.Textbox, gr.Textbox]:
    """A gallery or lines, as the first model needs them, and a note."""
    is_text = site.models.all[0].makes == "text"
    shown = parts.gallery("Result", site.models.all, columns=columns, visible=not is_text)
    return shown, parts.text_result("Result", visible=is_text), parts.note_line()


def _follow(site: Site, model: gr.Dropdown, sources: Sequence[Source], shown: gr.Gallery, lines: gr.Textbox) -> None:
    """Shows the fields and the results that suit the chosen model."""
    for source in sources:
        source.follow(model, site.models)

    def kind(name: str) -> list[object]:
        is_text = site.models.get(name).makes == "text"
        return [gr.update(visible=not is_text), gr.update(visible=is_text)]

    model.change(kind, model, [shown, lines], queue=False, show_progress="hidden", **PRIVATE)


def _answer(
    model: Model, started: float, outputs: Outputs, names: Sequence[str], **facts: object
) -> tuple[Any, str, str]:
    shown = parts.pictures(model, outputs, names, **facts)
    return shown, parts.texts(model, outputs, names), parts.note(model, started, [], **facts)


def _interpolation(site: Site, prompts: Sequence[str]) -> None:
    models, limits = site.models, site.limits
    with gr.Row(elem_classes=["work"]):
        with gr.Column(scale=2, min_width=300):
            model = parts.model_choice(models.all)
            start, end = (
                Source.form(label, models.all, limits, value)
                for label, value in zip(("From", "To"), prompts, strict=True)
            )
            frames = gr.Slider(2, limits.frames, value=7, step=1, label="Frames")
            with gr.Row():
                kind = gr.Dropdown(KINDS, value=KINDS[0], label="Path", filterable=False, min_width=120)
                seed = gr.Number(0, label="Seed", precision=0, min_width=120)
            buttons = Buttons.form("Walk", "run-interpolate")
        with gr.Column(scale=3, min_width=300):
            shown, lines, line = _results(site, limits.frames)
            place = gr.Slider(0, 1, value=0, step=0.01, label="Between the two", elem_id="place", visible=False)
    _follow(site, model, (start, end), shown, lines)

    @site.jobs.endpoint
    def interpolate(
        on_step: Progress, model: str, start: str, start_picture: str, end: str, end_picture: str,
        frames: float, kind: str, seed: float,
    ) -> tuple[Any, str, str]:  # fmt: skip
        started, used = time.monotonic(), models.get(model)
        ends = [
            parts.read_source(used, limits, prompt, picture, name)
            for prompt, picture, name in ((start, start_picture, "The start"), (end, end_picture, "The end"))
        ]
        num, way, key = whole(frames, "Frames", 2, limits.frames), choice(kind, "path", KINDS), parts.seed_of(seed)
        outputs = latents.interpolate(used.pipe, ends[0], ends[1], num, kind=way, seed=key, on_step=on_step)
        names = [f"{k / (num - 1):.2f}" for k in range(num)]
        return _answer(used, started, outputs, names, frames=num, path=way, seed=key)

    fields = [model, *start.fields, *end.fields, frames, kind, seed]
    about = "Outputs for source latents between those of two inputs."
    buttons.start(site, interpolate, fields, [shown, lines, line], name="interpolate", about=about)
    shown.change(
        lambda frames: gr.update(visible=bool(frames), value=0), shown, place, queue=False, show_progress="hidden",
        **PRIVATE,
    )  # fmt: skip
    place.input(
        lambda at, frames: gr.update(selected_index=round(at * (len(frames) - 1))) if frames else gr.skip(),
        [place, shown], shown, queue=False, show_progress="hidden", **PRIVATE,
    )  # fmt: skip


def _arithmetic(site: Site) -> None:
    models, limits = site.models, site.limits
    with gr.Row(elem_classes=["work"]):
        with gr.Column(scale=2, min_width=300):
            model = parts.model_choice(models.all)
            terms = [Source.form(label, models.all, limits) for label in ("Base", "Plus", "Minus")]
            strength = gr.Slider(-2, 2, value=1, step=0.1, label="Strength")
            seed = gr.Number(0, label="Seed", precision=0)
            buttons = Buttons.form("Compute", "run-arithmetic")
        with gr.Column(scale=3, min_width=300):
            shown, lines, line = _results(site, 3)
    _follow(site, model, terms, shown, lines)

    @site.jobs.endpoint
    def arithmetic(
        on_step: Progress, model: str, base: str, base_picture: str, plus: str, plus_picture: str,
        minus: str, minus_picture: str, strength: float, seed: float,
    ) -> tuple[Any, str, str]:  # fmt: skip
        started, used = time.monotonic(), models.get(model)
        value = parts.read_source(used, limits, base, base_picture, "The base")
        added = parts.read_optional(used, limits, plus, plus_picture, "Plus")
        subtracted = parts.read_optional(used, limits, minus, minus_picture, "Minus")
        k, key = number(strength, "The strength", -2, 2), parts.seed_of(seed)
        outputs = latents.arithmetic(
            used.pipe, value, plus=added, minus=subtracted, strengths=(0, k / 2, k), seed=key, on_step=on_step
        )
        names = ["the base", f"strength {k / 2:g}", f"strength {k:g}"]
        return _answer(used, started, outputs, names, strength=k, seed=key)

    fields = [model, *(field for term in terms for field in term.fields), strength, seed]
    about = "Outputs for base + k (plus - minus) of source latents, k = 0, half the strength, and the strength."
    buttons.start(site, arithmetic, fields, [shown, lines, line], name="arithmetic", about=about)


def _inversion(site: Site) -> None:
    models, limits = site.models, site.limits
    is_text = models.all[0].makes == "text"
    with gr.Row(elem_classes=["work"]):
        with gr.Column(scale=2, min_width=300):
            model = parts.model_choice(models.all)
            text = parts.prompt_box("An output: a caption", limits, visible=is_text)
            with gr.Column(visible=not is_text) as holder:
                picture = parts.upload("An output: a picture, or a depth map in millimetres")
            terms = [Source.form(label, models.all, limits) for label in ("Plus (to edit it)", "Minus (to edit it)")]
            strength = gr.Slider(0, 2, value=1, step=0.1, label="Strength")
            buttons = Buttons.form("Invert", "run-edit")
        with gr.Column(scale=3, min_width=300):
            shown, lines, line = _results(site, 3)
    _follow(site, model, terms, shown, lines)

    def kind(name: str) -> list[object]:
        writes = models.get(name).makes == "text"
        return [gr.update(visible=writes), gr.update(visible=not writes)]

    model.change(kind, model, [text, holder], queue=False, show_progress="hidden", **PRIVATE)
    fields = [model, text, picture, *(field for term in terms for field in term.fields), strength]
    about = "An output, the same re-generated from its own source latent, and edited by base + k (plus - minus)."
    buttons.start(site, _edit(site), fields, [shown, lines, line], name="edit", about=about)


def _edit(site: Site) -> Any:
    models, limits = site.models, site.limits

    @site.jobs.endpoint
    def edit(
        on_step: Progress, model: str, text: str, picture: str, plus: str, plus_picture: str,
        minus: str, minus_picture: str, strength: float,
    ) -> tuple[Any, str, str]:  # fmt: skip
        started, used = time.monotonic(), models.get(model)
        value = _output(site, used, text, picture)
        added = parts.read_optional(used, limits, plus, plus_picture, "Plus")
        subtracted = parts.read_optional(used, limits, minus, minus_picture, "Minus")
        k = number(strength, "The strength", 0, 2)
        inversion = latents.invert(used.pipe, value, on_step=on_step)
        outputs, names = inversion.outputs, ["as given", "re-generated"]
        facts: dict[str, object] = {"error of the latent": inversion.error}
        shown, lines = parts.pictures(used, outputs, names), parts.texts(used, outputs, names)
        if added is not None or subtracted is not None:
            edited = latents.edit(used.pipe, value, plus=added, minus=subtracted, strengths=(k,), on_step=on_step)
            names, facts = [f"edited, strength {k:g}"], {**facts, "strength": k}
            shown += parts.pictures(used, edited, names)
            lines = "\n".join(filter(None, (lines, parts.texts(used, edited, names))))
        return shown, lines, parts.note(used, started, [], **facts)

    return edit


def _output(site: Site, model: Model, text: str, picture: str) -> Any:
    """A finished output of a model, as inversion takes it."""
    if model.makes == "text":
        return site.limits.text(text, "The caption")
    if model.makes == "metres":
        return site.limits.depth(picture, "The depth map")
    value = site.limits.picture(picture, "The picture")
    if len(model.pipe.task.target(value).values) > site.limits.pieces:
        raise UserError(f"The picture has more than {site.limits.pieces} tiles; give a smaller one.")
    return value
