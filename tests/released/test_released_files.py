"""Released files are recognised; other networks, damaged files and files with code are refused."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossflow.core.errors import UserError
from crossflow.released import expected
from crossflow.released.convert import from_file
from crossflow.released.files import Piece, write_safetensors
from crossflow.released.known import FILES, identify, recognise

DATA = os.environ.get("CROSSFLOW_TEST_DATA")
GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = json.loads((GOLDEN / "released_files.json").read_text())


def digest(shapes):
    """Number and SHA-256 of the sorted keys and shapes without the image tower's."""
    lines = sorted(f"{key} {list(shape)}" for key, shape in shapes.items() if not key.startswith("open_clip.visual."))
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_settings_of_the_released_files_give_their_tensors(name):
    known = next(known for known in FILES if known.name == name)
    assert known.kind == RECORDED[name]["kind"]
    actual = digest(expected(known.kind, known.config, list(known.marks)))
    assert actual == (RECORDED[name]["num_tensors"], RECORDED[name]["sha256"])


@pytest.mark.skipif(DATA is None, reason="needs the key lists of the released files")
@pytest.mark.parametrize("name", RECORDED)
def test_the_released_files_are_recognised(name):
    path = Path(DATA) / "golden/checkpoints" / f"{name.replace('TiTok-', 'TiTok_')}.json"
    released = json.loads(path.read_text())
    known = recognise({key: torch.empty(shape, device="meta") for key, shape in released["shapes"].items()})
    assert known.name == name
    assert digest(released["shapes"]) == (RECORDED[name]["num_tensors"], RECORDED[name]["sha256"])
    for setting, value in known.config.items():
        if setting in released["config"] and not isinstance(value, (dict, list)):
            assert released["config"][setting] == value


@pytest.mark.slow
def test_other_networks_need_their_kind_and_settings(files, configs, tmp_path):
    path, config, state = files("dimr")
    with pytest.raises(UserError, match=r"not one of the released files.*--kind .*--config"):
        from_file(path, tmp_path / "run")
    with pytest.raises(UserError, match="dimrr"):
        from_file(path, tmp_path / "run", kind="dimrr", config=config)
    with pytest.raises(UserError, match=r"holds \d+ of the \d+ tensors of a 'dit' network"):
        from_file(path, tmp_path / "run", kind="dit", config=files("dit")[1])
    plain = tmp_path / "plain.yaml"
    plain.write_text(json.dumps(configs["dimr"]))
    assert from_file(path, tmp_path / "run", kind="dimr", config=plain).num_tensors == len(state)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        from_file(path, tmp_path / "other", config=broken)
    broken.write_text("{}")
    with pytest.raises(UserError, match="lacks"):
        from_file(path, tmp_path / "other", kind="dimr", config=broken)


def test_a_wrong_kind_of_a_released_file_is_refused(tmp_path):
    known = next(known for known in FILES if known.name == "FlowTok-XL")
    tensors = {key: torch.empty(tuple(shape), device="meta") for key, shape in known.marks.items()}
    with pytest.raises(UserError, match="is FlowTok-XL, of the kind 'flowtok', not 'dimr'"):
        identify(tensors, "dimr", None, tmp_path / "file.pth")
    assert identify(tensors, None, None, tmp_path / "file.pth") is known


# -- files that are refused


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    torch.save({"weight": torch.zeros(1), "more": Code(tmp_path / "made")}, tmp_path / "new.pth")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"weight": Code(tmp_path / "made")}, protocol=2))
    for name in ("new.pth", "plain.bin"):
        with pytest.raises(UserError, match="holds more than tensors"):
            from_file(tmp_path / name, tmp_path / "run")
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.long(), r"1 of another shape or type: .* is of torch\.int64"),
        (lambda tensor: tensor.to(torch.complex64), r"1 tensors of other types than .*complex64"),
        (lambda tensor: tensor.to_sparse(), r"1 tensors of other types than .*sparse"),
    ],
)
def test_tensors_of_other_types_are_refused(files, tmp_path, change, message):
    _, config, state = files("dimr")
    key = "context_encoder.linear.weight"
    torch.save({**state, key: change(state[key])}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=message):
        from_file(tmp_path / "odd.pth", tmp_path / "run", config=config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"stage_configs": 5},
        {"stage_configs": []},
        {"stage_configs": [1, 2]},
        {"textVAE": 3},
        {"clip_dim": [768]},
        {"loss_coeffs": 7},
    ],
)
def test_settings_of_a_wrong_type_are_refused(configs, change):
    with pytest.raises(UserError, match=r"config|released DiMR|textVAE"):
        expected("dimr", configs["dimr"] | change, ())


def test_a_settings_file_with_an_invalid_kind_is_refused(files, configs, tmp_path):
    (tmp_path / "strange.json").write_text(json.dumps({"kind": ["dimr"], "config": configs["dimr"]}))
    with pytest.raises(UserError, match="Known: "):
        from_file(files("dimr")[0], tmp_path / "run", config=tmp_path / "strange.json")


@pytest.mark.slow
def test_truncated_and_other_files_are_refused(files, tmp_path):
    path, _, state = files("flowtok")
    whole = path.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-10])
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "cut_old.pth").write_bytes((tmp_path / "old.pth").read_bytes()[:-1000])
    for name in ("cut.pth", "cut.safetensors", "cut_old.pth"):
        with pytest.raises(UserError, match="truncated or damaged"):
            from_file(tmp_path / name, tmp_path / "run")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(UserError, match="not a file of torch"):
        from_file(tmp_path / "pointer.pth", tmp_path / "run")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="got list"):
        from_file(tmp_path / "list.pth", tmp_path / "run")
    with pytest.raises(UserError, match="does not exist"):
        from_file(tmp_path / "nothing.pth", tmp_path / "run")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        from_file(tmp_path / "notes.txt", tmp_path / "run")


def test_a_stream_of_tensors_is_a_safetensors_file(tmp_path):
    state = {
        "flag": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 3).T,
        "count": torch.arange(7),
    }
    counts = []
    pieces = [Piece(name, tensor.to("meta"), lambda tensor=tensor: tensor) for name, tensor in state.items()]
    write_safetensors(tmp_path / "file.safetensors", pieces, counts.append)
    written = load_file(tmp_path / "file.safetensors")
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    assert sum(counts) == sum(tensor.nbytes for tensor in state.values())
