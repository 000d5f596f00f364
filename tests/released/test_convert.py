"""Conversion of released files: a converted run makes the reference's pictures, the inverse is exact, memory is
bounded, and failures leave nothing behind.
"""

import json
import os
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crossflow.cli import main
from crossflow.core.errors import UserError
from crossflow.core.noise import item_noise
from crossflow.engine import latents
from crossflow.engine.sample import load
from crossflow.engine.train import Run
from crossflow.networks.codecs.registry import load_codec
from crossflow.released import convert, expected, from_reference, restore
from crossflow.released.convert import from_file
from crossflow.released.restore import to_file
from crossflow.tasks import load_config

DATA = os.environ.get("CROSSFLOW_TEST_DATA")
GOLDEN = Path(__file__).parents[1] / "golden"
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


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "encoder", "guidance", "prompts", "as_read"),
    [
        ("dimr", "clip", 7.0, ["a red cube", "a blue sphere"], None),
        ("dit", "t5", 7.0, ["A RED  cube", "two spheres (blue)"], ["a red cube", "two spheres blue"]),
        ("flowtok", "clip", 2.0, ["a red cube", "a blue sphere"], None),
    ],
)
def test_a_converted_run_makes_the_references_pictures(
    files, configs, encoders, runs, kind, encoder, guidance, prompts, as_read
):
    pipe = load(runs(kind), precision="float32")
    assert (pipe.settings.guidance, pipe.settings.time_grid) == (guidance, "released")
    assert pipe.settings.steps == (20 if kind == "flowtok" else 50)
    pictures = pipe(prompts, ids=["a/0", "b/0"], seed=3, steps=5, output_type="np")

    model = from_reference(kind, files(kind)[2], configs[kind])
    features, mask = features_by_hand(encoders(encoder), as_read or prompts, 0 if kind == "flowtok" else None)
    posterior = model.source_encoder(features, mask)
    z0 = posterior.mean + (posterior.log_var / 2).exp() * item_noise(3, ["a/0", "b/0"], posterior.mean.shape[1:])
    z1 = euler_by_hand(model, z0, 5, guidance)
    if kind == "flowtok":
        tokenizer = from_reference("flowtitok", files("flowtitok")[2], configs["flowtitok"])
        right = 2 * tokenizer.decode(z1 / 1.0143, features) - 1  # trained on pictures in [0, 1]
    else:
        autoencoder = from_reference("autoencoder_kl", files("autoencoder_kl")[2], configs["autoencoder_kl"]).network
        right = autoencoder.decode(z1 / 0.2301).sample
    right = ((right.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert pictures[0].shape == (64, 64, 3)
    assert right.std() > 10  # they show something
    assert np.abs(np.stack(pictures).astype(int) - right).max() <= 1
    assert (np.stack(pictures) == right).mean() > 0.99


@pytest.mark.slow
def test_flowtok_reads_padding_with_token_zero(runs):
    text = load(runs("flowtok")).task.text
    assert text.settings.pad_id == 0
    padded, mask = text.frozen(["a red cube"])
    text.frozen.settings = replace(text.frozen.settings, pad_id=None)
    other, _ = text.frozen(["a red cube"])
    assert torch.equal(padded[mask], other[mask])
    assert (padded[~mask] - other[~mask]).abs().max() > 1e-2


@pytest.mark.slow
def test_flowtoks_pictures_are_decoded_under_their_texts(runs, monkeypatch):
    """The latent tools too: the ends of an interpolation are what sampling gives, between them are both texts."""
    pipe = load(runs("flowtok"))
    prompts, settings = ["a red cube", "a blue sphere"], {"steps": 2, "mode": True, "output_type": "np"}
    calls, decode = [], pipe.task.decode

    def watched(z1, features):
        calls.append(features)
        return decode(z1, features)

    monkeypatch.setattr(pipe.task, "decode", watched)
    frames = latents.interpolate(pipe, *prompts, 3, **settings)
    ends = pipe(prompts, **settings)
    assert np.abs(np.stack([frames[0], frames[-1]]).astype(int) - np.stack(ends)).max() <= 1
    between, alone = calls
    torch.testing.assert_close(between, torch.stack([alone[0], alone.mean(0), alone[1]]))
    (same,) = latents.arithmetic(pipe, "a red cube", plus="a blue sphere", strengths=[0.0], **settings)
    assert np.abs(same.astype(int) - ends[0]).max() <= 1
    tokens = torch.randn(1, 77, 16, generator=torch.Generator().manual_seed(0))
    pictures = [decode(tokens, features[None])[0].astype(int) for features in alone]
    assert np.abs(pictures[0] - pictures[1]).max() > 1


@pytest.mark.slow
def test_commands_convert_sample_and_convert_back(files, encoders, tmp_path, capsys):
    path, config, state = files("dimr")
    vae, vae_config, _ = files("autoencoder_kl")
    run, codec, back = tmp_path / "run", tmp_path / "codec", tmp_path / "back.pth"
    assert main(["convert", str(vae), str(codec), "--config", str(vae_config)]) == 0
    assert main(["convert", str(path), str(run), "--kind", "dimr", "--config", str(config)]) == 0
    output = capsys.readouterr().out
    assert f"{len(state)} tensors" in output
    assert "openai/clip-vit-large-patch14" in output
    assert "codec.source: stabilityai/sd-vae-ft-ema" in output
    moved = ["--set", f"text.encoder={encoders('clip')}", "--set", f"codec.source={codec}"]
    sample = ["sample", "--checkpoint", str(run), "--prompt", "a red cube", "--steps", "2"]
    assert main([*sample, "--output", str(tmp_path / "out"), *moved]) == 0
    assert (tmp_path / "out" / "0000.png").is_file()
    assert main(["convert", str(run), str(back)]) == 0
    assert_equal(torch.load(back, weights_only=True), state)


@pytest.mark.slow
def test_the_networks_beside_a_run_can_be_replaced(encoders, runs, tmp_path):
    import shutil

    original = load(runs("dimr"))("a red cube", steps=2, output_type="np")
    clip = shutil.copytree(encoders("clip"), tmp_path / "clip")
    codec = shutil.copytree(load(runs("dimr")).task.codec.source, tmp_path / "vae")
    moved = load(runs("dimr"), overrides=[f"text.encoder={clip}", f"codec.source={codec}"])
    assert moved.task.text.frozen.settings.source == str(clip)
    assert moved.task.codec.source == str(codec)
    assert np.array_equal(moved("a red cube", steps=2, output_type="np")[0], original[0])
    with pytest.raises(UserError, match=r"feature_width = 768, but .* 4096 wide"):
        load(runs("dimr"), overrides=[f"text.encoder={encoders('t5')}"])


# -- converting back


def assert_equal(back, state):
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype, key
        assert torch.equal(back[key], tensor), key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dimr", "dit", "flowtok", "flowtitok", "autoencoder_kl"])
def test_converting_back_is_exact(files, tmp_path, kind):
    path, config, state = files(kind)
    converted = from_file(path, tmp_path / "run", config=config)
    assert (converted.kind, converted.num_tensors, converted.dropped) == (kind, len(state), {})
    reports = []
    to_file(tmp_path / "run", tmp_path / "back.pth", progress=lambda done, total: reports.append((done, total)))
    to_file(tmp_path / "run", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert_equal(back, state)
    assert_equal(torch.load(tmp_path / "back.pth", weights_only=True, mmap=True), state)
    assert reports[-1][0] >= reports[-1][1] > 0


@pytest.mark.slow
def test_precision_and_missing_parts_survive(files, tmp_path):
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


def test_wrapped_and_old_state_dicts_are_read(files, tmp_path):
    _, config, state = files("flowtok")
    torch.save({"state_dict": state}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    from_file(tmp_path / "old.bin", tmp_path / "run", config=config)
    to_file(tmp_path / "run", tmp_path / "back.safetensors")
    assert_equal(load_file(tmp_path / "back.safetensors"), state)


@pytest.mark.slow
def test_a_saved_pipeline_may_replace_the_file_it_was_loaded_from(runs, tmp_path):
    import shutil

    run = shutil.copytree(runs("dimr"), tmp_path / "run")
    before = load_file(run / "model.safetensors")
    before = {key: tensor.clone() for key, tensor in before.items()}
    load(run).save(run)
    assert_equal(load_file(run / "model.safetensors"), before)


@pytest.mark.slow
def test_a_saved_copy_of_a_run_converts_back(files, runs, tmp_path):
    load(runs("dimr")).save(tmp_path / "copy")
    to_file(tmp_path / "copy", tmp_path / "back.safetensors")
    assert_equal(load_file(tmp_path / "back.safetensors"), files("dimr")[2])


# -- where it is written


@pytest.mark.slow
def test_a_failed_conversion_leaves_nothing(files, tmp_path, monkeypatch):
    path, config, _ = files("dimr")
    (tmp_path / ".tmp-run").mkdir()  # of a conversion that was killed
    (tmp_path / ".tmp-run" / "rest").write_text("x")

    def fails(*args):
        raise OSError(28, "No space left on device", "model.safetensors")

    with monkeypatch.context() as broken:
        broken.setattr(convert, "write_safetensors", fails)
        with pytest.raises(OSError, match="No space left"):
            from_file(path, tmp_path / "run", config=config)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    from_file(path, tmp_path / "run", config=config)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with monkeypatch.context() as broken:
        broken.setattr(restore, "write_torch", fails)
        with pytest.raises(OSError, match="No space left"):
            to_file(tmp_path / "run", tmp_path / "back.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_full_disk_is_reported_before_anything_is_written(files, tmp_path, monkeypatch):
    path, config, _ = files("dimr")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda where: usage(2**40, 2**40, 2**20))
    with pytest.raises(UserError, match=r"GiB, but the disk of .* has only 0\.00 GiB left"):
        from_file(path, tmp_path / "run", config=config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_existing_files_are_not_overwritten(files, runs, tmp_path):
    path, config, _ = files("dimr")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        from_file(path, tmp_path / "full", config=config)
    with pytest.raises(UserError, match="is a file"):
        from_file(path, tmp_path / "full" / "mine", config=config)
    with pytest.raises(UserError, match="already exists"):
        to_file(runs("dimr"), path)
    with pytest.raises(UserError, match="must end in"):
        to_file(runs("dimr"), tmp_path / "name")
    assert (tmp_path / "full" / "mine").read_text() == "x"


@pytest.mark.slow
def test_overrides_cannot_change_the_network(files, tmp_path):
    path, config, _ = files("dimr")
    with pytest.raises(UserError, match=r"source\.depth=3 the network would have other tensors"):
        from_file(path, tmp_path / "run", config=config, overrides=["source.depth=3"])
    with pytest.raises(UserError, match="does not exist"):
        from_file(path, tmp_path / "run", config=config, overrides=["codec.source=./nowhere"])
    with pytest.raises(UserError, match=r"or 'text\.encoder'"):
        from_file(path, tmp_path / "run", config=config, overrides=["encoder=x"])
    vae, vae_config, _ = files("autoencoder_kl")
    with pytest.raises(UserError, match="no settings to override"):
        from_file(vae, tmp_path / "run", config=vae_config, overrides=["codec.scale=1"])
    assert main(["convert", str(tmp_path), str(tmp_path / "x.pth"), "codec.scale=1"]) == 2


@pytest.mark.slow
def test_a_folder_that_was_not_converted_needs_its_kind(files, runs, tiny_run, tmp_path):
    run = tiny_run("t2i")
    with pytest.raises(UserError, match="name it with --kind"):
        to_file(run, tmp_path / "x.pth")
    with pytest.raises(UserError, match="is not of the kind 'dimr'"):
        to_file(run, tmp_path / "x.pth", kind="dimr")
    with pytest.raises(UserError, match="of the kind 'dimr', not 'dit'"):
        to_file(runs("dimr"), tmp_path / "x.pth", kind="dit")


@pytest.mark.slow
@pytest.mark.parametrize("record", ["{", "[]", "{}"])
def test_a_damaged_record_of_the_origin_is_refused(runs, tmp_path, record):
    import shutil

    run = shutil.copytree(runs("dimr"), tmp_path / "run")
    (run / "released.json").write_text(record)
    with pytest.raises(UserError, match="is damaged, so the origin"):
        to_file(run, tmp_path / "x.pth")


@pytest.mark.slow
def test_a_run_without_origin_is_written_under_the_original_keys(files, runs, tmp_path):
    """A run trained with a released network instead of converted: given its kind, the generator is written."""
    import shutil

    run = shutil.copytree(runs("dimr"), tmp_path / "run")
    (run / "released.json").unlink()
    (run / "objective.safetensors").unlink()
    to_file(run, tmp_path / "x.safetensors", kind="dimr")
    state = {key: tensor for key, tensor in files("dimr")[2].items() if not key.startswith("open_clip")}
    assert_equal(load_file(tmp_path / "x.safetensors"), state)


@pytest.mark.slow
def test_a_converted_model_trains_further_and_is_written_back(files, runs, tmp_path):
    converted = runs("dimr")
    data = ["data.train=scenes", "data.num_train=8", "data.num_val=4"]
    training = [f"train.start_from={converted}", "train.steps=1", "train.batch_size=4", "train.warmup_steps=0"]
    run = Run.open(load_config(converted, [*data, *training, "loss.encoder=none", "train.lr=0.01"]), tmp_path / "run")
    initial = {key: tensor.clone() for key, tensor in run.model.state_dict().items()}
    assert_equal(initial, load_file(converted / "model.safetensors"))
    run.trainer().run(None)
    to_file(tmp_path / "run", tmp_path / "trained.safetensors", kind="dimr")
    trained, file = load_file(tmp_path / "trained.safetensors"), files("dimr")[2]
    assert trained.keys() == {key for key in file if not key.startswith("open_clip")}
    assert not torch.equal(trained["stages.1.output_layer.2.weight"], file["stages.1.output_layer.2.weight"])


def test_a_converted_codec_loads_as_a_codec(files, tmp_path):
    path, config, _ = files("autoencoder_kl")
    codec = load_codec(from_file(path, tmp_path / "vae", config=config).path)
    assert codec.scale.flatten().tolist() == pytest.approx([0.2301] * 4)
    assert codec.latent_shape(64) == (4, 8, 8)


# -- memory

MEASURE = """
import re, sys
from crossflow.released.convert import from_file
from crossflow.released.restore import to_file
from_file(sys.argv[1], sys.argv[2] + "/first", config=sys.argv[3])  # imports happen before the measurement
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
from_file(sys.argv[4], sys.argv[2] + "/second", config=sys.argv[5])
there = peak() - before
to_file(sys.argv[2] + "/second", sys.argv[2] + "/back.pth")
print(there, peak() - before)
"""


def large(kind, configs):
    """A config of a few hundred megabytes."""
    config = configs[kind]
    if kind == "flowtitok":
        sizes = {"vit_enc_model_size": "small", "vit_dec_model_size": "small"}
        return {**config, "vq_model": {**config["vq_model"], **sizes}}
    stages = [
        {**stage, "dim": stage["dim"] * 48, "hidden_dim": stage["hidden_dim"] * 48} for stage in config["stage_configs"]
    ]
    return {**config, "stage_configs": stages}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(("kind", "suffix"), [("dimr", "pth"), ("dimr", "safetensors"), ("flowtitok", "pth")])
def test_memory_stays_below_the_size_of_the_file(files, configs, forked, tmp_path, kind, suffix):
    small, small_config, _ = files(kind)
    config = large(kind, configs)
    (tmp_path / "config.json").write_text(json.dumps({"kind": kind, "config": config}))
    state = {key: torch.zeros(shape) for key, shape in expected(kind, config, ()).items()}
    path = tmp_path / f"large.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    size = path.stat().st_size
    assert size > 150e6
    (tmp_path / "measure.py").write_text(MEASURE)
    arguments = [tmp_path / "measure.py", small, tmp_path, small_config, path, tmp_path / "config.json"]
    printed = forked.Forked([str(part) for part in arguments], tmp_path / "log").finish()
    there, both = map(int, printed.splitlines()[-1].split())
    assert 0 < there < 1.3 * size
    assert both < 1.3 * size
