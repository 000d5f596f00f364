"""The tab that looks inside: samples of the source, and the states of the flow step by step."""

import time
from typing import Any

import gradio as gr

from crossflow.core.progress import Progress
from crossflow.demo import parts
from crossflow.demo.limits import whole
from crossflow.demo.models import examples
from crossflow.demo.parts import PRIVATE, Buttons, Sampling, Site, Source
from crossflow.engine.trajectory import source_samples, trajectory

LEAD = (
    "A flow carries the latent of the source to that of the output. Above: where it is at each time. Below: where it "
    "would end if it went straight on from there."
)


def build(site: Site) -> None:
    """The tab, with the endpoints /trajectory and /source."""
    models, limits = site.models, site.limits
    with gr.Tab("Step by step", id="steps"):
        parts.lead(LEAD)
        with gr.Row(elem_classes=["work"]):
            with gr.Column(scale=2, min_width=300):
                model = parts.model_choice(models.all)
                shown = examples(models.all[0], site.cache) if models.all[0].takes_text else []
                source = Source.form("Source", models.all, limits, shown[0] if shown else "")
                source.follow(model, models)
                num = gr.Slider(2, limits.frames, value=6, step=1, label="States, or samples of the source")
                path_buttons = Buttons.form("Follow the flow", "run-steps")
                sampled = gr.Button("Sample the source", elem_id="run-source")
                source_buttons = Buttons(sampled, path_buttons.cancel)
                with gr.Accordion("Settings", open=False):
                    sampling = Sampling.form(models.all, limits)
                    sampling.follow(model, models, limits)
            with gr.Column(scale=3, min_width=300):
                above = parts.heading("State of the flow")
                states = parts.gallery("State of the flow", models.all, columns=6)
                below = parts.heading("Where it is heading")
                ends = parts.gallery("Where it is heading", models.all, columns=6)
                moment = gr.Slider(0, limits.frames - 1, value=0, step=1, label="Step through", visible=False)
                lines = parts.text_result("Decoded", visible=models.all[0].makes == "text")
                line = parts.note_line()
    fields = [model, *source.fields, num]
    path_buttons.start(
        site, _trajectory(site), [*fields, *sampling.fields], [states, ends, lines, line], name="trajectory",
        about="States of the flow from the source to the output, decoded, and where each was heading.",
        enter=[source.prompt],
    )  # fmt: skip
    source_buttons.start(
        site, _source(site), [*fields, sampling.seed], [states, ends, lines, line], name="source",
        about="The mean of the source posterior and samples of it, decoded, and the outputs that begin at the samples.",
    )  # fmt: skip
    states.change(
        lambda shown: gr.update(visible=bool(shown), maximum=max(1, len(shown or []) - 1), value=0),
        states, moment, queue=False, show_progress="hidden", **PRIVATE,
    )  # fmt: skip
    moment.input(
        lambda at: [gr.update(selected_index=int(at))] * 2, moment, [states, ends], queue=False,
        show_progress="hidden", **PRIVATE,
    )  # fmt: skip
    model.change(
        lambda name: _visible(models.get(name).makes == "text"), model, [above, states, below, ends, lines],
        queue=False, show_progress="hidden", **PRIVATE,
    )  # fmt: skip


def _visible(is_text: bool) -> list[object]:
    return [*(gr.update(visible=not is_text) for _ in range(4)), gr.update(visible=is_text)]


def _trajectory(site: Site) -> Any:
    limits = site.limits

    @site.jobs.endpoint
    def follow(
        on_step: Progress, model: str, prompt: str, picture: str, states: float,
        steps: float, guidance: float, solver: str, seed: float,
    ) -> tuple[Any, Any, str, str]:  # fmt: skip
        started, used = time.monotonic(), site.models.get(model)
        value = parts.read_source(used, limits, prompt, picture, "The source")
        settings, key = parts.settings(used, limits, steps, guidance, solver), parts.seed_of(seed)
        num = whole(states, "States", 2, limits.frames)
        path = trajectory(used.pipe, value, num, seed=key, on_step=on_step, **settings)
        names, facts = [f"t = {t:.2f}" for t in path.times], parts.facts_of(settings, key)
        pictures = [parts.pictures(used, each, names, **facts) for each in (path.states, path.ends)]
        lines = "\n\n".join(filter(None, (parts.texts(used, path.states, names), parts.texts(used, path.ends, names))))
        return pictures[0], pictures[1], lines, parts.note(used, started, _texts(value), **facts)

    return follow


def _source(site: Site) -> Any:
    limits = site.limits

    @site.jobs.endpoint
    def sample_source(
        on_step: Progress, model: str, prompt: str, picture: str, samples: float, seed: float
    ) -> tuple[Any, Any, str, str]:
        started, used = time.monotonic(), site.models.get(model)
        value = parts.read_source(used, limits, prompt, picture, "The source")
        num, key = whole(samples, "Samples", 2, limits.num), parts.seed_of(seed)
        means, drawn = source_samples(used.pipe, value, num, seed=key)
        outputs = used.pipe(value, num=num, seed=key, on_step=on_step)
        names = [f"sample {k}" for k in range(num)]
        sources = parts.pictures(used, means, ["mean"] * len(means)) + parts.pictures(used, drawn, names, seed=key)
        lines = [parts.texts(used, means, ["mean"] * len(means)), parts.texts(used, drawn, names)]
        lines.append(parts.texts(used, outputs, [f"output {k}" for k in range(num)]))
        shown = parts.pictures(used, outputs, [f"its output {k}" for k in range(num)], seed=key)
        text = "\n".join(filter(None, lines))
        return sources, shown, text, parts.note(used, started, _texts(value), samples=num, seed=key)

    return sample_source


def _texts(value: object) -> list[str]:
    """A prompt as a list, for the search for unknown words; empty for a picture."""
    return [value] if isinstance(value, str) else []
