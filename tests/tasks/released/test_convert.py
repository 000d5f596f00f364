"""Conversion of released files: the pictures of a converted run are the reference's, the way back is exact, a file that
is not what it should be is told, and nothing half-written is left.
"""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.noise import item_noise
from crossflow.tasks.common.codecs import load_codec
from crossflow.tasks.common.tokenizer import build_tokenizer
from crossflow.tasks.pipeline import load
from crossflow.tasks.released import convert, expected, from_reference
from crossflow.tasks.released.convert import from_file, to_file
from crossflow.tasks.released.known import FILES, identify, recognise

DATA = os.environ.get("CROSSFLOW_TEST_DATA")
GOLDEN = Path(__file__).parents[2] / "golden"
TEXT = {"num_blocks": 1, "hidden_dim": 32, "hidden_token_length": 256, "num_attention_heads": 8, "dropout_prob": 0.1}
STAGE = {"image_input_ratio": 1, "final_kernel_size": 3, "dropout_prob": 0}
CROSSFLOW = {"channels": 4, "num_clip_token": 77, "cfg_indicator": 0.1, "textVAE": TEXT}
DIMR = {
    **CROSSFLOW,
    "clip_dim": 768,
    "stage_configs": [
        {"block_type": "TransformerBlock", "dim": 16, "hidden_dim": 32, "num_attention_heads": 2, "num_blocks": 3}
        | {"max_height": 4, "max_width": 4, "input_feature_ratio": 2}
        | STAGE,
        {"block_type": "ConvNeXtBlock", "dim": 8, "hidden_dim": 16, "kernel_size": 7, "num_blocks": 3}
        | {"max_height": 8, "max_width": 8, "input_feature_ratio": 1}
        | STAGE,
    ],
}
DIT = {**CROSSFLOW, "clip_dim": 4096, "latent_size": 8, "learn_sigma": False, "patch_size": 2}
DIT |= {"hidden_size": 32, "depth": 2, "num_heads": 4}
FLOWTOK = {
    "learn_sigma": False,
    "channels": 16,
    "clip_dim": 768,
    "num_clip_token": 77,
    "use_t2t_temperature": True,
    "cfg_indicator": 0.1,
    "textVAE": TEXT,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
}
TITOK = {
    "vq_model": {
        "token_size": 16,
        "vit_enc_model_size": "tiny",
        "vit_dec_model_size": "tiny",
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": 77,
    },
    "dataset": {"crop_size": 64},
}
VAE = {
    "scale_factor": 0.2301,
    "ddconfig": {
        "z_channels": 4,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
    },
}
CONFIGS = {"dimr": DIMR, "dit": DIT, "flowtok": FLOWTOK, "flowtitok": TITOK, "autoencoder_kl": VAE}


@pytest.fixture(scope="module")
def files(recipe, tmp_path_factory):
    """files(kind): (released file of a small network by recipe, its settings' file, its tensors)."""
    root, made = tmp_path_factory.mktemp("files"), {}

    def make(kind):
        if kind not in made:
            shapes = expected(kind, CONFIGS[kind], ())
            state = recipe.weights({key: shape for key, shape in shapes.items() if "freqs_" not in key})
            path, config = root / f"{kind}.pth", root / f"{kind}.json"
            torch.save(state, path)
            config.write_text(json.dumps({"kind": kind, "config": CONFIGS[kind]}))
            made[kind] = path, config, state
        return made[kind]

    return make


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """encoders(name): the folder of a tiny clip | t5 text encoder of the released widths, with its tokenizer."""
    import transformers

    root = tmp_path_factory.mktemp("encoders")

    def make(name):
        folder = root / name
        if folder.exists():
            return folder
        torch.manual_seed(0)
        if name == "clip":
            sizes = {"hidden_size": 768, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 12}
            marks = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
            network = transformers.CLIPTextModel(
                transformers.CLIPTextConfig(vocab_size=400, max_position_embeddings=77, **sizes, **marks)
            )
        else:
            network = transformers.T5EncoderModel(
                transformers.T5Config(vocab_size=400, d_model=4096, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            )
        network.save_pretrained(folder)
        tokenizer = build_tokenizer(["a red cube", "a blue sphere"], vocab_size=400, max_length=77)
        if name == "clip":
            tokenizer.pad_token = tokenizer.eos_token  # as CLIP's own does
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def runs(files, encoders, tmp_path_factory):
    """runs(kind): a converted run with its text encoder and codec, made once; not to be written to."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def make(kind):
        if kind not in made:
            path, config, _ = files(kind)
            encoder, codec = {
                "dimr": ("clip", "autoencoder_kl"),
                "dit": ("t5", "autoencoder_kl"),
                "flowtok": ("clip", "flowtitok"),
            }[kind]
            if codec not in made:
                made[codec] = from_file(files(codec)[0], root / codec, config=files(codec)[1]).path
            overrides = [f"text.encoder={encoders(encoder)}", f"codec.source={made[codec]}"]
            overrides += ["data.image_size=64"] if kind == "flowtok" else []
            made[kind] = from_file(path, root / kind, config=config, overrides=overrides).path
        return made[kind]

    return make


# -- pictures


def features_by_hand(folder, prompts, pad_id=None):
    """Last hidden states (B, 77, D) and mask, through transformers alone."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    ids, mask = rows["input_ids"], rows["attention_mask"]
    if pad_id is not None:
        ids = torch.where(mask.bool(), ids, pad_id)
    if "T5" in json.loads((folder / "config.json").read_text())["architectures"][0]:
        network = transformers.T5EncoderModel.from_pretrained(folder).eval()
        return network(input_ids=ids, attention_mask=mask).last_hidden_state * 10, mask.bool()
    return transformers.CLIPTextModel.from_pretrained(folder).eval()(input_ids=ids).last_hidden_state, mask.bool()


def euler_by_hand(model, z, num_steps, scale):
    """The released sampler: times spaced over the whole interval, steps of a num_steps-th of it."""
    for i in range(num_steps):
        t = torch.full((len(z),), i / (num_steps - 1) * (1 - 1e-5))
        conditional = model.velocity(z, t, torch.zeros(len(z), dtype=torch.bool))
        unconditional = model.velocity(z, t, torch.ones(len(z), dtype=torch.bool))
        z = z + (1 - 1e-5) / num_steps * (unconditional + scale * (conditional - unconditional))
    return z


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "encoder", "guidance", "prompts", "as_read"),
    [
        ("dimr", "clip", 7.0, ["a red cube", "a blue sphere"], None),
        ("dit", "t5", 7.0, ["A RED  cube", "two spheres (blue)"], ["a red cube", "two spheres blue"]),
        ("flowtok", "clip", 2.0, ["a red cube", "a blue sphere"], None),
    ],
)
def test_pictures_are_those_of_the_reference(files, encoders, runs, kind, encoder, guidance, prompts, as_read):
    pipe = load(runs(kind))
    assert (pipe.settings.guidance, pipe.settings.time_grid) == (guidance, "released")
    assert pipe.settings.steps == (20 if kind == "flowtok" else 50)
    pictures = pipe(prompts, ids=["a", "b"], seed=3, steps=5)

    model = from_reference(kind, files(kind)[2], CONFIGS[kind])
    features, mask = features_by_hand(encoders(encoder), as_read or prompts, 0 if kind == "flowtok" else None)
    posterior = model.source_encoder(features, mask)
    z0 = posterior.mean + (posterior.log_var / 2).exp() * item_noise(3, ["a/0", "b/0"], posterior.mean.shape[1:])
    z1 = euler_by_hand(model, z0, 5, guidance)
    if kind == "flowtok":
        tokenizer = from_reference("flowtitok", files("flowtitok")[2], TITOK)
        right = tokenizer.decode(z1 / 1.0143, features)
    else:
        autoencoder = from_reference("autoencoder_kl", files("autoencoder_kl")[2], VAE).network
        right = autoencoder.decode(z1 / 0.2301).sample
    right = ((right.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert pictures[0].shape == (64, 64, 3)
    assert right.std() > 10  # they show something
    assert np.abs(np.stack(pictures).astype(int) - right).max() <= 1
    assert (np.stack(pictures) == right).mean() > 0.99


def test_flowtoks_features_are_padded_with_zero_and_padding_counts(runs):
    text = load(runs("flowtok")).task.text
    assert text.settings.pad_id == 0
    padded, mask = text.features(["a red cube"])
    text.frozen.pad_id = None
    other, _ = text.features(["a red cube"])
    assert torch.equal(padded[mask], other[mask])
    assert (padded[~mask] - other[~mask]).abs().max() > 1e-2


def test_commands_convert_sample_and_convert_back(files, encoders, tmp_path, capsys):
    path, config, state = files("dimr")
    vae, vae_config, _ = files("autoencoder_kl")
    run, codec, back = tmp_path / "run", tmp_path / "codec", tmp_path / "back.pth"
    assert main(["convert", str(vae), str(codec), "--config", str(vae_config)]) == 0
    assert main(["convert", str(path), str(run), "--kind", "dimr", "--config", str(config)]) == 0
    told = capsys.readouterr().out
    assert f"{len(state)} tensors" in told
    assert "openai/clip-vit-large-patch14" in told
    assert "codec.source: stabilityai/sd-vae-ft-ema" in told
    moved = ["--set", f"text.encoder={encoders('clip')}", "--set", f"codec.source={codec}"]
    sample = ["sample", "--checkpoint", str(run), "--prompt", "a red cube", "--steps", "2"]
    assert main([*sample, "--output", str(tmp_path / "out"), *moved]) == 0
    assert (tmp_path / "out" / "0000.png").is_file()
    assert main(["convert", str(run), str(back)]) == 0
    assert_equal(torch.load(back, weights_only=True), state)


def test_networks_beside_a_run_can_be_replaced(encoders, runs, tmp_path):
    import shutil

    there = load(runs("dimr"))("a red cube", steps=2)
    clip = shutil.copytree(encoders("clip"), tmp_path / "clip")
    codec = shutil.copytree(load(runs("dimr")).task.codec.source, tmp_path / "vae")
    moved = load(runs("dimr"), overrides=[f"text.encoder={clip}", f"codec.source={codec}"])
    assert moved.task.text.frozen.source == str(clip)
    assert moved.task.codec.source == str(codec)
    assert np.array_equal(moved("a red cube", steps=2)[0], there[0])
    with pytest.raises(UserError, match=r"feature_width = 768, but .* 4096 wide"):
        load(runs("dimr"), overrides=[f"text.encoder={encoders('t5')}"])


# -- the way back


def assert_equal(back, state):
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype, key
        assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize("kind", ["dimr", "dit", "flowtok", "flowtitok", "autoencoder_kl"])
def test_the_way_back_is_exact(files, tmp_path, kind):
    path, config, state = files(kind)
    converted = from_file(path, tmp_path / "run", config=config)
    assert (converted.kind, converted.num_tensors, converted.dropped) == (kind, len(state), {})
    seen = []
    to_file(tmp_path / "run", tmp_path / "back.pth", progress=lambda done, total: seen.append((done, total)))
    to_file(tmp_path / "run", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert_equal(back, state)
    assert_equal(torch.load(tmp_path / "back.pth", weights_only=True, mmap=True), state)
    assert seen[-1][0] >= seen[-1][1] > 0


def test_precision_and_parts_of_a_file_are_kept(files, tmp_path):
    _, config, state = files("dimr")
    half = {key: tensor.half() if tensor.ndim > 1 else tensor for key, tensor in state.items()}
    tower = {"open_clip.visual.trunk.pos_embed": torch.randn(1, 4, 8), "open_clip.visual.norm.bias": torch.randn(8)}
    without = {key: tensor for key, tensor in half.items() if key != "open_clip.logit_scale"}
    save_file(without | tower, tmp_path / "half.safetensors")
    converted = from_file(tmp_path / "half.safetensors", tmp_path / "run", config=config)
    ((reason, keys),) = converted.dropped.items()
    assert "image tower" in reason
    assert set(keys) == set(tower)
    assert sorted(json.loads((tmp_path / "run" / "released.json").read_text())["dropped"][reason]) == sorted(keys)
    to_file(tmp_path / "run", tmp_path / "back.pt")
    assert_equal(torch.load(tmp_path / "back.pt", weights_only=True), without)


def test_a_state_dict_may_be_wrapped_and_old(files, tmp_path):
    _, config, state = files("flowtok")
    torch.save({"state_dict": state}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    from_file(tmp_path / "old.bin", tmp_path / "run", config=config)
    to_file(tmp_path / "run", tmp_path / "back.safetensors")
    assert_equal(load_file(tmp_path / "back.safetensors"), state)


def test_a_saved_pipeline_may_replace_the_file_it_was_loaded_from(runs, tmp_path):
    import shutil

    run = shutil.copytree(runs("dimr"), tmp_path / "run")
    before = load_file(run / "model.safetensors")
    before = {key: tensor.clone() for key, tensor in before.items()}
    load(run).save(run)
    assert_equal(load_file(run / "model.safetensors"), before)


# -- which file it is


RECORDED = json.loads((GOLDEN / "released_files.json").read_text())


def digest(shapes):
    """Of the sorted keys and shapes that are used, those of the image tower left out."""
    lines = sorted(f"{key} {list(shape)}" for key, shape in shapes.items() if not key.startswith("open_clip.visual."))
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("name", RECORDED)
def test_settings_of_the_released_files_give_their_tensors(name):
    known = next(one for one in FILES if one.name == name)
    assert known.kind == RECORDED[name]["kind"]
    found = digest(expected(known.kind, known.config, list(known.marks)))
    assert found == (RECORDED[name]["num_tensors"], RECORDED[name]["sha256"])


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


def test_other_networks_need_their_kind_and_settings(files, tmp_path):
    path, config, state = files("dimr")
    with pytest.raises(UserError, match=r"not one of the released files.*--kind .*--config"):
        from_file(path, tmp_path / "run")
    with pytest.raises(UserError, match="dimrr"):
        from_file(path, tmp_path / "run", kind="dimrr", config=config)
    with pytest.raises(UserError, match=r"holds \d+ of the \d+ tensors of a 'dit' network"):
        from_file(path, tmp_path / "run", kind="dit", config=files("dit")[1])
    plain = tmp_path / "plain.yaml"
    plain.write_text(json.dumps(CONFIGS["dimr"]))
    assert from_file(path, tmp_path / "run", kind="dimr", config=plain).num_tensors == len(state)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        from_file(path, tmp_path / "other", config=broken)
    broken.write_text("{}")
    with pytest.raises(UserError, match="lacks"):
        from_file(path, tmp_path / "other", kind="dimr", config=broken)


def test_a_wrong_kind_of_a_released_file_is_told(tmp_path):
    known = next(one for one in FILES if one.name == "FlowTok-XL")
    tensors = {key: torch.empty(tuple(shape), device="meta") for key, shape in known.marks.items()}
    with pytest.raises(UserError, match="is FlowTok-XL, of the kind 'flowtok', not 'dimr'"):
        identify(tensors, "dimr", None, tmp_path / "file.pth")
    assert identify(tensors, None, None, tmp_path / "file.pth") is known


# -- what is not a file of weights


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


def test_cut_off_and_other_files_are_told(files, tmp_path):
    path, _, state = files("flowtok")
    whole = path.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-10])
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "cut_old.pth").write_bytes((tmp_path / "old.pth").read_bytes()[:-1000])
    for name in ("cut.pth", "cut.safetensors", "cut_old.pth"):
        with pytest.raises(UserError, match="cut off or damaged"):
            from_file(tmp_path / name, tmp_path / "run")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(UserError, match="no file of torch's"):
        from_file(tmp_path / "pointer.pth", tmp_path / "run")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds list"):
        from_file(tmp_path / "list.pth", tmp_path / "run")
    with pytest.raises(UserError, match="There is no file"):
        from_file(tmp_path / "nothing.pth", tmp_path / "run")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        from_file(tmp_path / "notes.txt", tmp_path / "run")


# -- where it is written


def test_nothing_half_written_is_left(files, tmp_path, monkeypatch):
    path, config, _ = files("dimr")
    (tmp_path / ".run.converting").mkdir()  # of a conversion that was killed
    (tmp_path / ".run.converting" / "rest").write_text("x")

    def fails(*args):
        raise OSError(28, "No space left on device", "model.safetensors")

    with monkeypatch.context() as broken:
        broken.setattr(convert, "write_safetensors", fails)
        with pytest.raises(OSError, match="No space left"):
            from_file(path, tmp_path / "run", config=config)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    from_file(path, tmp_path / "run", config=config)
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
    with monkeypatch.context() as broken:
        broken.setattr(convert, "write_torch", fails)
        with pytest.raises(OSError, match="No space left"):
            to_file(tmp_path / "run", tmp_path / "back.pth")
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_full_disks_are_told_before_anything_is_written(files, tmp_path, monkeypatch):
    path, config, _ = files("dimr")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda where: usage(2**40, 2**40, 2**20))
    with pytest.raises(UserError, match=r"GiB, and the disk of .* has 0\.00 GiB left"):
        from_file(path, tmp_path / "run", config=config)
    assert list(tmp_path.iterdir()) == []


def test_what_lies_there_is_not_touched(files, runs, tmp_path):
    path, config, _ = files("dimr")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        from_file(path, tmp_path / "full", config=config)
    with pytest.raises(UserError, match="is a file"):
        from_file(path, tmp_path / "full" / "mine", config=config)
    with pytest.raises(UserError, match="is there already"):
        to_file(runs("dimr"), path)
    with pytest.raises(UserError, match="ends in"):
        to_file(runs("dimr"), tmp_path / "name")
    assert (tmp_path / "full" / "mine").read_text() == "x"


def test_overrides_cannot_change_the_network(files, tmp_path):
    path, config, _ = files("dimr")
    with pytest.raises(UserError, match=r"source\.depth=3 the network would have other tensors"):
        from_file(path, tmp_path / "run", config=config, overrides=["source.depth=3"])
    with pytest.raises(UserError, match=r"no such folder"):
        from_file(path, tmp_path / "run", config=config, overrides=["codec.source=./nowhere"])
    with pytest.raises(UserError, match=r"or 'text\.encoder'"):
        from_file(path, tmp_path / "run", config=config, overrides=["encoder=x"])
    vae, vae_config, _ = files("autoencoder_kl")
    with pytest.raises(UserError, match="no settings to override"):
        from_file(vae, tmp_path / "run", config=vae_config, overrides=["codec.scale=1"])
    assert main(["convert", str(tmp_path), str(tmp_path / "x.pth"), "codec.scale=1"]) == 2


def test_folders_that_were_not_converted_need_their_kind(files, runs, tiny_run, tmp_path):
    run = tiny_run("t2i")
    with pytest.raises(UserError, match="say which with --kind"):
        to_file(run, tmp_path / "x.pth")
    with pytest.raises(UserError, match="is not of the kind 'dimr'"):
        to_file(run, tmp_path / "x.pth", kind="dimr")
    with pytest.raises(UserError, match="of the kind 'dimr', not 'dit'"):
        to_file(runs("dimr"), tmp_path / "x.pth", kind="dit")


def test_a_network_trained_here_is_written_under_the_original_keys(files, runs, tmp_path):
    """A run on a released network that did not come from a file: its kind is said, its generator is written."""
    import shutil

    run = shutil.copytree(runs("dimr"), tmp_path / "run")
    (run / "released.json").unlink()
    (run / "objective.safetensors").unlink()
    to_file(run, tmp_path / "x.safetensors", kind="dimr")
    state = {key: tensor for key, tensor in files("dimr")[2].items() if not key.startswith("open_clip")}
    assert_equal(load_file(tmp_path / "x.safetensors"), state)


def test_a_codecs_folder_is_a_codec(files, tmp_path):
    path, config, _ = files("autoencoder_kl")
    codec = load_codec(from_file(path, tmp_path / "vae", config=config).path)
    assert codec.scale.flatten().tolist() == pytest.approx([0.2301] * 4)
    assert codec.latent_shape(64) == (4, 8, 8)


# -- memory

MEASURE = """
import resource, sys
from crossflow.tasks.released.convert import from_file, to_file
from_file(sys.argv[1], sys.argv[2] + "/first", config=sys.argv[3])  # whatever is loaded once is loaded now
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
from_file(sys.argv[4], sys.argv[2] + "/second", config=sys.argv[5])
there = peak() - before
to_file(sys.argv[2] + "/second", sys.argv[2] + "/back.pth")
print(there, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_memory_stays_below_the_size_of_the_file(files, recipe, tmp_path, suffix):
    small, small_config, _ = files("dimr")
    wide = [
        {**stage, "dim": stage["dim"] * 48, "hidden_dim": stage["hidden_dim"] * 48} for stage in DIMR["stage_configs"]
    ]
    config = {**DIMR, "stage_configs": wide}
    (tmp_path / "config.json").write_text(json.dumps({"kind": "dimr", "config": config}))
    state = {key: torch.zeros(shape) for key, shape in expected("dimr", config, ()).items()}
    path = tmp_path / f"large.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    size = path.stat().st_size
    assert size > 150e6
    arguments = [small, tmp_path, small_config, path, tmp_path / "config.json"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=300
    )
    there, both = map(int, done.stdout.split())
    assert there < 1.3 * size
    assert both < 1.3 * size
