"""The page through its API: what it computes, what it refuses and in which words, and what it does not show."""

import io
import json
import os
import struct
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio", reason='the page needs gradio: pip install "crossflow-toolkit[demo]"')

import httpx
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import crossflow
from crossflow.cli import main
from crossflow.demo.guard import CACHE, ROUTES, is_public, problem_of
from crossflow.demo.limits import Limits

pytestmark = pytest.mark.slow
SETTINGS = {"steps": 2, "guidance": 1.0, "solver": "euler", "seed": 3}
NUM_HOSTILE = int(os.environ.get("CROSSFLOW_HOSTILE_REQUESTS", "60"))


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 28, 3), dtype=np.uint8)).save(path)
    return path


def test_each_task_computes_what_the_pipeline_computes(client, page, photo: Path) -> None:
    pipes = {model.name: model.pipe for model in page.models.all}
    shown, note = client.predict("a red cube", "t2i", 2, *SETTINGS.values(), api_name="/t2i")
    expected = pipes["t2i"]("a red cube", num=2, output_type="np", **SETTINGS)
    for picture, truth in zip(shown, expected, strict=True):
        assert np.array_equal(pixels(picture["image"]), truth)
    with Image.open(shown[0]["image"]) as picture:
        assert (picture.info["prompt"], picture.info["seed"], picture.info["model"]) == ("a red cube", "3", "t2i")
    assert "seed 3" in note
    text, _ = client.predict(handle_file(photo), "caption", 1, *SETTINGS.values(), api_name="/caption")
    assert [text] == pipes["caption"](photo, **SETTINGS).captions
    for name in ("depth", "sr"):
        shown, _ = client.predict(handle_file(photo), name, 1, *SETTINGS.values(), api_name=f"/{name}")
        assert np.array_equal(pixels(shown[0]["image"]), np.array(pipes[name](photo, **SETTINGS).images[0])), name


def test_latent_tools_and_steps_agree_with_sampling(client, page) -> None:
    """The first frame of a walk, the base of a sum and the end of a trajectory are the output itself."""
    pipe = page.models.get("t2i").pipe
    expected = pipe("a red cube", seed=0, output_type="np")[0]
    walk, _, _ = client.predict("t2i", "a red cube", None, "a blue sphere", None, 3, "lerp", 0, api_name="/interpolate")
    sums, _, _ = client.predict(
        "t2i", "a red cube", None, "a blue sphere", None, "", None, 1.0, 0, api_name="/arithmetic"
    )
    assert np.array_equal(pixels(walk[0]["image"]), pixels(sums[0]["image"]))
    assert [frame["caption"] for frame in walk] == ["0.00", "0.50", "1.00"]
    settings = pipe.settings
    states, ends, _, _ = client.predict(
        "t2i", "a red cube", None, 3, settings.steps, settings.guidance, settings.solver, 0, api_name="/trajectory"
    )
    assert np.array_equal(pixels(states[-1]["image"]), expected)
    assert np.array_equal(pixels(ends[-1]["image"]), expected)
    sources, outputs, _, _ = client.predict("t2i", "a red cube", None, 2, 0, api_name="/source")
    assert (len(sources), len(outputs)) == (3, 2)
    assert np.array_equal(pixels(outputs[0]["image"]), expected)
    left, right, _, _ = client.predict("t2i", "t2i (2)", "a red cube", None, 1, 0, api_name="/compare")
    assert np.array_equal(pixels(left[0]["image"]), pixels(right[0]["image"]))


def test_an_output_is_inverted_and_edited(client, tmp_path: Path) -> None:
    shown, _ = client.predict("a red cube", "t2i", 1, *SETTINGS.values(), api_name="/t2i")
    picture = handle_file(shown[0]["image"])
    edited, _, note = client.predict("t2i", "", picture, "a blue cube", None, "a red cube", None, 1.0, api_name="/edit")
    assert [each["caption"] for each in edited] == ["as given", "re-generated", "edited, strength 1"]
    assert np.array_equal(pixels(edited[0]["image"]), pixels(shown[0]["image"]))
    assert "error of the latent" in note
    _, lines, _ = client.predict("caption", "a red cube", None, "", None, "", None, 1.0, api_name="/edit")
    assert [line.split(":")[0] for line in lines.splitlines()] == ["as given", "re-generated"]


def test_curves_and_items_are_shown_without_their_places(client, page) -> None:
    chart = client.predict(["first"], "steps", api_name="/curves")
    assert chart.count("<polyline") == 2
    assert "<figcaption>loss" in chart
    table = client.predict("scored", "psnr_y", "worst first", None, None, 2, api_name="/items")
    assert table.index("10") < table.index("&lt;b&gt;b") < table.index("&lt;b&gt;c"), "in order, and as text"
    assert "&lt;b&gt;a" not in table
    assert "&lt;b&gt;a" in client.predict("scored", "psnr_y", "best first", 15, 35, 1, api_name="/items")
    for text in (chart, table):
        assert "secret-place" not in text
    with pytest.raises(AppError, match="evaluated model is not loaded"):
        client.predict("scored", "psnr_y", "worst first", None, None, 2, api_name="/draw_items")


def test_items_are_drawn_again_by_the_evaluated_model(tmp_path: Path, page) -> None:
    from crossflow.benchmarks.evaluation.evaluate import Evaluation
    from crossflow.demo.evaluations import draw

    pipe = page.models.get("sr").pipe
    evaluation = Evaluation.open(pipe, spec="scenes", num=3)
    cases = evaluation.plan.cases.all()
    (tmp_path / "items.jsonl").write_text("".join(json.dumps({"id": case.id, "psnr_y": 20.0}) + "\n" for case in cases))
    (tmp_path / "metrics.json").write_text(json.dumps({"scores": {}, "manifest": evaluation.identity()}))
    ((*_, output, truth),) = draw(tmp_path / "metrics.json", page.models, [cases[1].id], None)
    assert np.array_equal(output.image, pipe.outputs([cases[1].input], [cases[1].id], 0)[0])
    assert np.array_equal(truth.image, cases[1].truth)


@pytest.mark.parametrize(
    ("endpoint", "values", "sentence"),
    [
        ("/t2i", ("", "t2i", 1, 2, 1.0, "euler", 0), "is empty"),
        ("/t2i", ("x" * 301, "t2i", 1, 2, 1.0, "euler", 0), "at most 300"),
        ("/t2i", ("a", "t2i", 99, 2, 1.0, "euler", 0), "maximum"),
        ("/t2i", ("a", "t2i", 1, 2.5, 1.0, "euler", 0), "whole number"),
        ("/t2i", ("a", "../t2i", 1, 2, 1.0, "euler", 0), "not in the list"),
        ("/caption", (None, "caption", 1, 2, 1.0, "euler", 0), "Upload a picture"),
        ("/edit", ("t2i", "", None, "", None, "", None, 1.0), "Upload a picture"),
        ("/compare", ("t2i", "sr", "a", None, 1, 0), "not in the list"),
        ("/curves", (["../../etc"], "steps"), "Unknown run"),
    ],
)
def test_errors_are_sentences(client, endpoint: str, values: tuple[object, ...], sentence: str) -> None:
    with pytest.raises(AppError, match=sentence):
        client.predict(*values, api_name=endpoint)


def test_pictures_that_are_none_are_refused_in_words(client, page, tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(AppError, match="cannot be read as a picture") as error:
        client.predict(handle_file(text), "sr", 1, *SETTINGS.values(), api_name="/sr")
    assert "/" not in str(error.value).replace("PNG/JPEG", "")
    (tmp_path / "bomb.png").write_bytes(bomb(20_000))
    with pytest.raises(AppError, match="limit of 40,000,000"):
        client.predict(handle_file(tmp_path / "bomb.png"), "sr", 1, *SETTINGS.values(), api_name="/sr")
    large = tmp_path / "large.bin"
    large.write_bytes(b"x" * (Limits().upload + 1000))
    with large.open("rb") as file:
        assert httpx.post(f"{page.url}/gradio_api/upload", files={"files": file}, timeout=60).status_code == 413


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that claims side x side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_computation_is_cancelled_by_its_visitor_alone(page) -> None:
    from gradio import skip

    from crossflow.demo.jobs import Jobs

    jobs, started, release = Jobs(), threading.Event(), threading.Event()

    class Visitor:
        session_hash = "first"

    class Stranger:
        session_hash = "second"

    def compute(on_step: Callable[[int, int], None], steps: int) -> int:
        for step in range(steps):
            on_step(step, steps)
            started.set()
            assert release.wait(10)
        return steps

    handler, bars = jobs.endpoint(compute), []
    with ThreadPoolExecutor() as pool:
        running = pool.submit(handler, 3, Visitor(), lambda *values, **about: bars.append(values))
        assert started.wait(10)
        jobs.cancel(Stranger())
        jobs.cancel(Visitor())
        release.set()
        assert running.result(10) == skip()
    assert bars == [((0, 3),)]
    assert handler(2, Visitor(), lambda *values, **about: None) == 2, "cancelled once, not for ever"


def test_twenty_visitors_wait_for_their_turn(page) -> None:
    def visit(number: int) -> str:
        body = {"data": ["a red cube", "t2i", 1, 2, 1.0, "euler", number]}
        event = httpx.post(f"{page.url}/gradio_api/call/t2i", json=body, timeout=60).json()["event_id"]
        return httpx.get(f"{page.url}/gradio_api/call/t2i/{event}", timeout=120).text

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(visit, range(20)))
    assert all("event: complete" in answer and f"seed {number}" in answer for number, answer in enumerate(answers))


def test_the_server_gives_away_no_places_and_few_routes(page) -> None:
    root, here = page.url, str(crossflow.__file__)
    for path in ("/", "/config", "/gradio_api/info"):
        answer = httpx.get(root + path)
        assert answer.status_code == 200
        assert not leaks(answer.text, page), path
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    for path in (
        *("monitoring", "docs", "gradio_api/openapi.json", "gradio_api/proxy=http://example.org", "gradio_api/runs"),
        *(
            f"gradio_api/file={place}"
            for place in (here, "/etc/passwd", f"{CACHE}/../etc/passwd", "http://example.org")
        ),
        *(
            "static/../../../../etc/passwd",
            "assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
            "gradio_api/file=etc/passwd",
        ),
    ):
        answer = httpx.get(f"{root}/{path}")
        assert answer.status_code in (400, 403, 404), path
        assert not leaks(answer.text, page), path


def test_files_of_the_server_and_of_elsewhere_are_no_pictures(page) -> None:
    kind = {"_type": "gradio.FileData"}
    for place in ("/etc/passwd", "http://127.0.0.1:1/x.png", "https://example.org/x.png", f"{CACHE}/../x", "x\0"):
        for picture in ({"path": place, "meta": kind}, {"path": place}, {"path": place, "url": place, "meta": kind}):
            body = {"data": [picture, "sr", 1, 2, 1.0, "euler", 0]}
            answer = httpx.post(f"{page.url}/gradio_api/call/sr", json=body)
            assert (answer.status_code, "uploaded first" in answer.text) == (422, True), place


def test_a_password_guards_the_page(models) -> None:
    from crossflow.demo.page import Server

    with Server(models, auth=("me", "secret")) as server, httpx.Client(base_url=server.url) as visitor:
        body = {"data": ["a", "t2i", 1, 2, 1.0, "euler", 0]}
        assert visitor.get("/config").status_code == 401
        assert visitor.post("/gradio_api/call/t2i", json=body).status_code == 401
        assert visitor.post("/login", data={"username": "me", "password": "guess"}).status_code == 400
        assert visitor.post("/login", data={"username": "me", "password": "secret"}).status_code == 200
        assert visitor.post("/gradio_api/call/t2i", json=body).status_code == 200


def leaks(text: str, page) -> list[str]:
    """Signs of this machine in an answer: folders, tracebacks, source files."""
    package = str(Path(crossflow.__file__).resolve().parent)
    signs = (
        package,
        os.getcwd(),
        str(Path.home()),
        str(page.runs.parent),
        "site-packages",
        "Traceback",
        "/tmp/",
        '.py"',
    )
    return [sign for sign in signs if sign != "/" and sign in text]


def hostile(rng: np.random.Generator) -> object:
    """A value that nobody should send."""
    texts = [
        "", " ", "\0", "\u202e", "\ud800", "a" * 301, "a" * 50_000, "../" * 40 + "etc/passwd", "/etc/passwd",
        "file:///etc/passwd", "{{7*7}}", "<script>alert(1)</script>", "'; DROP TABLE x; --", "%s%n", "😀" * 200,
        "\n" * 300, "nan", "C:\\Windows", "\\\\host\\share", "a red cube",
    ]  # fmt: skip
    numbers = [0, -1, 1, 2, 1e308, -1e308, float("nan"), float("inf"), 2**63, 2.5, True, None]
    path = str(rng.choice(["/etc/passwd", f"{CACHE}/x.png", f"{CACHE}/../../x", "http://127.0.0.1/x", "x" * 5000]))
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}}, {"path": None, "url": "data:image/png;base64,AAAA"}]
    other = [[], {}, [[[]]] * 3, {"path": 3}, [path] * 9, {"a": {"b": {"c": path}}}]
    group = [texts, numbers, files, other][rng.integers(4)]
    return group[rng.integers(len(group))]


def test_hostile_requests_change_nothing(client, page, photo: Path) -> None:
    """CROSSFLOW_HOSTILE_REQUESTS sets their number; every seed is a request of its own."""
    good = ["a red cube", "t2i", 1, 2, 1.0, "euler", 0]
    known = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    shapes = {name.strip("/"): len(about["parameters"]) for name, about in known.items()}

    def attack(seed: int) -> None:
        rng = np.random.default_rng(seed)
        name = str(rng.choice(list(shapes)))
        data = [hostile(rng) for _ in range(int(shapes[name] * rng.choice([1, 1, 1, 0, 2])))]
        if rng.random() < 0.3:  # a single bad field among good ones
            name, data = "t2i", list(good)
            data[rng.integers(len(data))] = hostile(rng)
        text = json.dumps({"data": data})
        if rng.random() < 0.1:
            text = text[: rng.integers(len(text))]
        with httpx.Client(base_url=page.url, timeout=120) as visitor:
            if rng.random() < 0.15:
                noise = io.BytesIO(rng.bytes(int(rng.integers(1, 10_000))))
                answer = visitor.post("/gradio_api/upload", files={"files": ("../../x.png", noise)})
                assert not leaks(answer.text, page), seed
                if answer.status_code == 200:
                    picture = {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}
                    name, text = "sr", json.dumps({"data": [picture, "sr", 1, 2, 1.0, "euler", 0]})
            answer = visitor.post(
                f"/gradio_api/call/{name}", content=text.encode("utf-8", "surrogatepass"),
                headers={"content-type": "application/json"},
            )  # fmt: skip
            assert answer.status_code in (200, 400, 404, 413, 422), (seed, answer.text[:300])
            assert not leaks(answer.text, page), (seed, answer.text[:300])
            if answer.status_code == 200:
                stream = visitor.get(f"/gradio_api/call/{name}/{answer.json()['event_id']}")
                assert not leaks(stream.text, page), (seed, stream.text[:300])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(attack, range(NUM_HOSTILE)))
    shown, _ = client.predict(*good, api_name="/t2i")
    assert len(shown) == 1


def test_the_command_says_what_it_needs(capsys, tmp_path: Path, monkeypatch) -> None:
    assert main(["demo", "--checkpoint", "zoo:nothing"]) == 2
    assert "zoo:nothing" in capsys.readouterr().err
    assert main(["demo", "--runs", str(tmp_path), "--auth", "me"]) == 2
    assert "me:secret" in capsys.readouterr().err
    monkeypatch.setattr("crossflow.commands.demo.importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--runs", str(tmp_path)]) == 2
    assert "crossflow-toolkit[demo]" in capsys.readouterr().err


def test_requests_are_judged() -> None:
    assert problem_of(b'{"data": ["a"]}') is None
    assert problem_of(b"{") == problem_of(b"[" * 100_000) == "The request is not valid JSON."
    assert is_public(f"{CACHE}/a/b.png")
    assert not any(map(is_public, (f"{CACHE}x", f"{CACHE}/../x", "/etc", None, 3)))
    assert ROUTES.fullmatch("/gradio_api/queue/join")
    assert not ROUTES.fullmatch("/gradio_api/proxy=http://example.org")
