"""Runs on the hub, against a local stand-in of its HTTP interface: pushed by command and from Python, loaded by id,
revision, with a token and offline; nothing is unpickled, and nothing leaves the folder of the download.
"""

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.repocard import metadata_load

import crossflow
from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.files import read_metadata
from crossflow.engine.for_diffusers import export
from crossflow.engine.model_card import About

pytestmark = pytest.mark.slow
RUNS = Path(__file__).parents[1] / "golden" / "runs"


@pytest.fixture(scope="module")
def server():
    spec = importlib.util.spec_from_file_location("crossflow_tests_hub", Path(__file__).with_name("hub_server.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator:
    """The stand-in, which huggingface_hub takes for the hub, with a cache of its own and a valid token."""
    stand_in = server.Hub()
    template = stand_in.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", stand_in.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()


def run_files(task: str) -> dict[str, bytes]:
    folder = RUNS / task
    paths = (path for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_pushed_run_loads_by_its_name_and_makes_the_same_pictures(hub, capsys) -> None:
    argv = ["push", str(RUNS / "t2i"), "me/t2i", "--license", "mit", "--base-model", "me/first"]
    assert main(argv) == 0
    assert f"Published: {hub.address}/me/t2i/commit/" in capsys.readouterr().out
    files = hub.repositories["me/t2i"]["main"]
    assert {"config.yaml", "config.json", "README.md", "model.safetensors", "manifest.json"} <= files.keys()
    assert not [name for name in files if name.startswith("checkpoints") or name == "ema.safetensors"]
    assert "directory" not in json.loads(files["manifest.json"])
    pushed, own = crossflow.load("me/t2i"), crossflow.load(RUNS / "t2i")
    for prompt in ("a red cube", "a blue sphere"):
        assert np.array_equal(pushed(prompt, output_type="np")[0], own(prompt, output_type="np")[0])
    about = read_metadata(pushed.folder / "model.safetensors")
    assert (about["format"], about["weights"], about["library"]) == ("pt", "ema", "crossflow-toolkit")


def test_the_card_has_what_the_hub_reads(hub, tmp_path: Path) -> None:
    run = tmp_path / "depth run"
    shutil.copytree(RUNS / "depth", run)
    manifest = {"data": {"spec": "nyu:~/nyu", "split": "test"}, "protocol": {"title": "NYU", "headline": ["delta1"]}}
    evaluation = {"scores": {"delta1": 0.5, "rmse": 1.0, "num_items": 3.0}, "intervals": {}, "manifest": manifest}
    (run / "evaluation" / "nyu").mkdir(parents=True)
    (run / "evaluation" / "nyu" / "metrics.json").write_text(json.dumps(evaluation))
    (run / "samples").mkdir()
    for step in (1, 2, 3):
        (run / "samples" / f"step_{step}.png").write_bytes(b"picture")
    pipe = crossflow.load(run)
    pipe.push_to_hub("me/depth", about=About(license="apache-2.0", text="Of a test."), private=True, branch="dev")
    assert "me/depth" in hub.private
    files = hub.repositories["me/depth"]["dev"]
    assert hub.repositories["me/depth"]["main"] == {}
    assert {"evaluation/nyu/metrics.json", "samples/step_3.png"} <= files.keys()
    assert "samples/step_1.png" not in files
    (tmp_path / "README.md").write_bytes(files["README.md"])
    card = metadata_load(tmp_path / "README.md")
    assert (card["license"], card["pipeline_tag"], card["library_name"]) == (
        "apache-2.0", "depth-estimation", "crossflow-toolkit",
    )  # fmt: skip
    (model,) = card["model-index"]
    validation, nyu = model["results"]
    assert nyu["dataset"] == {"name": "nyu:nyu (NYU)", "type": "nyu", "split": "test"}
    assert nyu["metrics"] == [{"type": "delta1", "value": 0.5, "name": "delta1"}]
    assert validation["dataset"]["split"] == "val"
    text = files["README.md"].decode()
    assert "Of a test." in text
    assert "![Outputs: step_3](samples/step_3.png)" in text
    assert "| nyu:nyu (test) | NYU | delta1 | 0.5 |" in text
    assert json.loads(files["config.json"])["settings"]["task"] == "depth"


def test_what_is_published_names_no_folder_of_its_author(tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "sr"
    shutil.copytree(RUNS / "sr", run)
    private = f"{tmp_path}/my pictures"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["train"] = f"20 * folder:{private}@all + scenes"
    settings["train"] |= {"start_from": f"{tmp_path}/first", "parts_from": str(run.parent / "second")}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    manifest = {
        "directory": str(tmp_path),
        "command": ["train", f"data.train=folder:{private}"],
        "data": {"spec": private},
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "evaluation" / "own").mkdir(parents=True)
    evaluation = {"scores": {"psnr_y": 20.0}, "intervals": {}, "manifest": {"data": {"spec": f"pairs:{private}"}}}
    (run / "evaluation" / "own" / "metrics.json").write_text(json.dumps(evaluation))
    published = tmp_path / "published"
    assert main(["push", str(run), "me/sr", "--dry-run", "--output", str(published)]) == 0
    files = [path for path in published.rglob("*") if path.is_file()]
    assert not [path.name for path in files if str(tmp_path).encode() in path.read_bytes()]
    config = crossflow.load(published).task.config
    assert config.data.train == "20 * folder:my pictures@all + scenes"
    assert (config.train.start_from, config.train.parts_from) == ("first", "second")
    assert str(tmp_path) in (run / "config.yaml").read_text()


def test_places_are_hidden_and_names_and_addresses_stay() -> None:
    from crossflow.engine.places import without_folders

    texts = {
        "wds:https://host/a/b.tar": "wds:https://host/a/b.tar",
        "me/model": "me/model",
        "C:\\Users\\me\\first": "first",
        "folder:C:\\Users\\me\\mine@val": "folder:mine@val",
        "~/runs/first": "first",
        "a cube / a sphere": "a cube / a sphere",
    }
    assert without_folders(list(texts)) == list(texts.values())


def test_revisions_tokens_and_the_cache(hub, tmp_path: Path) -> None:
    first = hub.add("me/sr", run_files("sr"), "v1")
    changed = run_files("sr")
    changed["config.yaml"] = changed["config.yaml"].replace(b"seed: 0", b"seed: 7")
    hub.add("me/sr", changed)
    seeds = [crossflow.load(name).task.config.seed for name in ("me/sr", "me/sr@v1", f"me/sr@{first}")]
    assert seeds == [7, 0, 0]
    assert crossflow.Pipeline.from_pretrained("me/sr", revision="v1", cache_dir=tmp_path / "own").task.config.seed == 0
    assert list((tmp_path / "own").iterdir())
    hub.private.add("me/sr")
    with pytest.raises(UserError, match=r"me/sr \(revision v2\) is not a folder here, and .* unavailable"):
        crossflow.load("me/sr", revision="v2", token=False)
    num_requests = len(hub.requests)
    assert crossflow.load("me/sr", local_files_only=True).task.config.seed == 7
    assert len(hub.requests) == num_requests


def test_files_that_could_run_code_or_lie_elsewhere_are_not_read(hub, tmp_path: Path) -> None:
    files = run_files("sr")
    files |= {"pytorch_model.bin": b"no", "codec/evil.pt": b"no", "../../outside.json": b"{}", "a/../../b.json": b"{}"}
    files[str(tmp_path / "absolute.json")] = b"{}"
    hub.add("me/odd", files)
    folder = crossflow.load("me/odd").folder
    assert not [request for request in hub.requests if "/resolve/" in request and (".." in request or ".pt" in request)]
    assert not [path for path in tmp_path.rglob("*.json") if path.name in ("outside.json", "b.json", "absolute.json")]
    assert not list(folder.rglob("*.bin"))
    for name in ("ema.safetensors", "model.safetensors"):
        del files[name]
    hub.add("me/pickled", files)
    with pytest.raises(UserError, match=r"but pytorch_model.bin.*never read, since unpickling can run code"):
        crossflow.load("me/pickled")


def test_diffusers_loads_an_exported_run_by_its_name(hub, tmp_path: Path, monkeypatch) -> None:
    from diffusers import DiffusionPipeline

    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = export(RUNS / "t2i", tmp_path / "exported")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add("me/exported", files)
    options = {"trust_remote_code": True, "cache_dir": tmp_path / "cache"}
    (image,) = DiffusionPipeline.from_pretrained("me/exported", **options)("a red cube").images
    assert np.array_equal(np.array(image), crossflow.load(RUNS / "t2i")("a red cube", output_type="np")[0])


def test_refusals_of_the_hub_are_one_paragraph(hub, monkeypatch, capsys, tmp_path: Path) -> None:
    assert main(["push", str(RUNS / "sr"), "me/sr", "--pull-request"]) == 0
    assert "/me/sr/discussions/1" in capsys.readouterr().out
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for argv, message in (
        (["push", str(RUNS / "sr"), "me/sr"], "The hub did not take me/sr: .*hf auth login"),
        (["push", str(RUNS / "sr"), "a/b/c"], "is not a hub id"),
        (["push", str(tmp_path / "none"), "me/sr"], "does not exist"),
        (
            ["push", str(RUNS / "t2i"), "me/x", "--set", "text.encoder=/models/clip"],
            "text.encoder=/models/clip, a folder",
        ),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert re.search(message, error), error


def test_a_saved_pipeline_is_a_run_directory(tmp_path: Path) -> None:
    pipe = crossflow.load(RUNS / "caption")
    assert pipe.save_pretrained(tmp_path / "saved", about=About(title="A title")) is None
    again = crossflow.load(tmp_path / "saved")
    assert yaml.safe_load((tmp_path / "saved" / "config.yaml").read_text())["task"] == "caption"
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    assert list(again(picture)) == list(pipe(picture))
    assert (tmp_path / "saved" / "README.md").read_text().splitlines()[-1].startswith("Made for research")
    assert huggingface_hub.ModelCard.load(tmp_path / "saved" / "README.md").data.model_name == "A title"
