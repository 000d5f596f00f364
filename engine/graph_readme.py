"""The README of exported graphs: what they compute, and a program that samples by them."""

from collections.abc import Mapping
from typing import Any

LIBRARIES = {"onnx": "onnxruntime", "torch": "torch"}
OPEN = {
    "onnx": """

def network(name):
    session = onnxruntime.InferenceSession(f"{name}.onnx")
    return lambda **inputs: session.run(None, inputs)""",
    "torch": """

def network(name):
    graph = torch.export.load(f"{name}.pt2").module()

    def run(**inputs):
        return [y.detach().numpy() for y in graph(**{key: torch.from_numpy(x) for key, x in inputs.items()})]

    return run""",
}
GRAPHS = ("source", "velocity", "decoder")
PAGE = """# {task} as graphs for {library}

Networks of a CrossFlow run ({weights} weights). The batch size is open; other sizes are fixed:

| network | inputs | outputs |
|---|---|---|
{rows}

The flow leads from z0 at t = 0, the source, to z1 at t = 1: dz/dt = velocity(z, t). `unconditional` (B,) says whether a
sample goes without its source, for guidance. `settings.json` lists the steps as (t, length, guidance scale){solver}.

```python
{program}
```
"""


def readme(settings: Mapping[str, Any], library: str, *, has_tokenizer: bool) -> str:
    """The page, with a program for the kinds of input and output that `settings` describe."""
    inputs, outputs = settings["inputs"], settings["outputs"]
    rows = [f"| `{name}` | {_shapes(inputs[name])} | {', '.join(outputs[name])} |" for name in GRAPHS if name in inputs]
    is_euler = settings["solver"] in ("euler", "map")
    solver = (
        "" if is_euler else f"; the run itself takes them by {settings['solver']}, the program below by Euler's rule"
    )
    return PAGE.format(
        task=settings["task"],
        library=library,
        weights={"ema": "averaged"}.get(settings["weights"], "last"),
        rows="\n".join(rows),
        solver=solver,
        program=program(settings, library, has_tokenizer=has_tokenizer),
    )


def _shapes(inputs: Mapping[str, list[Any]]) -> str:
    return ", ".join(
        f"`{name}` {dtype} ({', '.join(map(str, ('B', *shape)))})" for name, (dtype, *shape) in inputs.items()
    )


def program(settings: Mapping[str, Any], library: str, *, has_tokenizer: bool) -> str:
    """The program: opens the graphs, reads an input, integrates the flow, writes the output."""
    imports, reading = _reading(settings, has_tokenizer)
    more, writing = _writing(settings, has_tokenizer)
    names = [name for name in GRAPHS if name in settings["inputs"]]
    lines = [
        "import json",
        "",
        "import numpy as np",
        f"import {LIBRARIES[library]}",
        *sorted({*imports, *more}),
        OPEN[library],
        "",
        "",
        f"{', '.join(names)} = map(network, {tuple(names)!r})".replace("'", '"'),
        reading,
        *_source(settings),
        *_flow(settings),
        writing,
    ]
    return "\n".join(lines)


def _reading(settings: Mapping[str, Any], has_tokenizer: bool) -> tuple[list[str], str]:
    """Imports, and the lines that make `inputs`."""
    inputs = settings["inputs"].get("source") or settings["inputs"]["velocity"]
    shape = inputs["features"][1:]
    if len(shape) == 3:
        height, width = shape[1:]
        return ["from PIL import Image"], (
            f'picture = Image.open("photo.png").convert("RGB").resize(({width}, {height}), Image.Resampling.BICUBIC)\n'
            'inputs = {"features": np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1}'
        )
    if has_tokenizer:
        return ["from tokenizers import Tokenizer"], (
            'tokenizer = Tokenizer.from_file("tokenizer.json")\n'
            f"tokenizer.enable_truncation({shape[0]})\n"
            f'tokenizer.enable_padding(length={shape[0]}, pad_id=tokenizer.token_to_id("<pad>"), pad_token="<pad>")\n'
            'text = tokenizer.encode("a red cube")\n'
            'inputs = {"features": np.array([text.ids]), "mask": np.array([text.attention_mask], dtype=bool)}'
        )
    return [], 'inputs = {"features": np.load("features.npy"), "mask": np.load("mask.npy")}  # of the text encoder'


def _source(settings: Mapping[str, Any]) -> list[str]:
    """The lines that make `z`, and what the velocity is conditioned on."""
    if settings["source"] == "gaussian":
        shape = ", ".join(map(str, (1, *settings["latent"])))
        return [f"z = np.random.default_rng(0).standard_normal(({shape}), dtype=np.float32)"]
    outputs = settings["outputs"]["source"]
    sampled = "  # or a sample: + np.exp(log_var / 2) * noise" * (len(outputs) == 2)
    names = ", ".join(outputs) if len(outputs) > 1 else f"({outputs[0]},)"
    return [f"{names} = source(**inputs)", f"z = mean{sampled}"]


def _flow(settings: Mapping[str, Any]) -> list[str]:
    """The loop over the steps."""
    is_conditioned = "features" in settings["inputs"]["velocity"]
    extra, doubled = ", **inputs" * is_conditioned, ", **doubled" * is_conditioned
    loop = ['for t, length, scale in json.load(open("settings.json"))["steps"]:']
    if settings["jumps"]:
        return [
            *loop,
            "    time, end, guidance = (np.full(len(z), value, np.float32) for value in (t, t + length, scale))",
            "    unconditional = np.zeros(len(z), dtype=bool)",
            "    (u,) = velocity(z=z, t=time, unconditional=unconditional, end=end, scale=guidance" + extra + ")",
            "    z = z + np.float32(length) * u",
        ]
    if all(scale == 1 for _, _, scale in settings["steps"]):
        return [
            *loop,
            "    time, unconditional = np.full(len(z), t, np.float32), np.zeros(len(z), dtype=bool)",
            f"    (v,) = velocity(z=z, t=time, unconditional=unconditional{extra})",
            "    z = z + np.float32(length) * v",
        ]
    twice = (
        ["    doubled = {name: np.concatenate([value, value]) for name, value in inputs.items()}"]
        if is_conditioned
        else []
    )
    return [
        *loop,
        "    both = np.concatenate([z, z])  # with and without the source",
        *twice,
        "    time, unconditional = np.full(len(both), t, np.float32), np.arange(len(both)) >= len(z)",
        f"    (velocities,) = velocity(z=both, t=time, unconditional=unconditional{doubled})",
        "    v, v_without = np.split(velocities, 2)",
        "    z = z + np.float32(length) * (v_without + np.float32(scale) * (v - v_without))",
    ]


def _writing(settings: Mapping[str, Any], has_tokenizer: bool) -> tuple[list[str], str]:
    """Imports, and the lines that write the output."""
    extra = ', features=inputs["features"]' * ("features" in settings["inputs"]["decoder"])
    decode = f"decoder(z=z{extra})[0][0]"
    shape = settings["output"]
    if len(shape) == 3 and shape[0] == 3:
        return ["from PIL import Image"], (
            f"pixels = {decode}.transpose(1, 2, 0) * 127.5 + 127.5\n"
            'Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).save("output.png")'
        )
    if len(shape) == 2 and has_tokenizer:
        return ["from tokenizers import Tokenizer"], (
            'tokenizer = Tokenizer.from_file("tokenizer.json")\n'
            f"ids = {decode}.argmax(-1)\n"
            'ends = [tokenizer.token_to_id(token) for token in ("<eos>", "<pad>")]\n'
            "length = next((n for n, id in enumerate(ids) if id in ends), len(ids))\n"
            "print(tokenizer.decode(ids[:length].tolist()))"
        )
    return [], f'np.save("output.npy", {decode})'
