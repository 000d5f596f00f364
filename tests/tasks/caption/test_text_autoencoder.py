"""The text autoencoder: captions survive the latent, also when the latent is missed, and the latent is well scaled."""

import random

import pytest
import torch

from crossflow.core.errors import UserError
from crossflow.networks.text.tokenizer import build_tokenizer
from crossflow.tasks.caption.decoder import TextAutoencoder, TextTraining, batch_rows
from crossflow.tasks.caption.layouts import Code, TextAutoencoderConfig, shares_of_tokens

COLOURS, SHAPES = ("red", "green", "blue", "grey"), ("cube", "sphere", "cone")


def grammar(count, seed):
    """Captions of one or two solids with a relation, a few thousand possible ones."""
    rng = random.Random(seed)

    def solid():
        return f"a {rng.choice(('small', 'large'))} {rng.choice(COLOURS)} {rng.choice(SHAPES)}"

    return [
        solid() if rng.random() < 0.3 else f"{solid()} {rng.choice(('left of', 'behind'))} {solid()}."
        for _ in range(count)
    ]


TRAIN, HELD_OUT = grammar(600, 0), grammar(100, 1)
SMALL = {"max_length": 14, "width": 32, "depth": 1, "heads": 2}
LAYOUTS = ("code", "patches")
LATENTS = [(1, 16, 16), (3, 8, 8), (12, 16), (5, 24)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TRAIN, vocab_size=400, max_length=14)


def make(tokenizer, latent=(1, 16, 16), seed=0, **config):
    torch.manual_seed(seed)
    return TextAutoencoder(tokenizer, latent, TextAutoencoderConfig(**{**SMALL, **config}))


@pytest.fixture(scope="module", params=[pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS])
def trained(request, tokenizer):
    autoencoder = make(tokenizer, layout=request.param)
    autoencoder.fit(TRAIN, TextTraining(steps=150, batch_size=32, lr=5e-3))
    return autoencoder


@pytest.mark.slow
def test_held_out_captions_survive_a_missed_latent(trained):
    exact = trained.evaluate(HELD_OUT)
    assert exact.token_accuracy >= 0.99
    assert exact.exact_match >= 0.95
    noisy = trained.evaluate(HELD_OUT, noise=0.5)
    assert noisy.token_accuracy >= 0.97
    assert trained.evaluate(HELD_OUT, noise=50.0).token_accuracy < 0.6


def test_latent_has_mean_zero_and_variance_one(trained):
    posterior = trained.encode(TRAIN)
    assert abs(posterior.mean.mean().item()) < 1e-3
    assert posterior.mean.std().item() == pytest.approx(1, abs=0.02)
    report = trained.evaluate(TRAIN[:64])
    assert 0.5 < report.spread <= report.latent_std < 1.5
    assert report.num_captions == 64


def test_texts_come_back_clean(trained):
    texts = trained.decode(
        trained.encode(["A  large RED cube", "a small blue cone left of a large grey sphere."]).mode()
    )
    assert texts == ["a large red cube", "a small blue cone left of a large grey sphere."]


def test_a_long_text_has_the_latent_of_its_beginning_and_an_empty_one_its_own(trained):
    repeated = "a small red cube "
    empty, shorter, longer = trained.encode(["", repeated * 20, repeated * 1000]).mean
    assert torch.equal(shorter, longer)
    assert empty.isfinite().all()
    assert (empty - shorter).abs().mean() > 0.1
    ids, mask = trained.tokenize([repeated * 1000])
    assert ids.shape == (1, trained.config.max_length)
    assert mask.all()


def test_a_text_of_unknown_characters_has_a_latent_of_its_own(trained):
    strange, known = trained.encode(["\U0001f993 \u05e9\u05dc\u05d5\u05dd", "a small red cube"]).mean
    assert strange.isfinite().all()
    assert (strange - known).abs().mean() > 0.1


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_latent_shape_trains_every_parameter(tokenizer, latent, layout):
    autoencoder = make(tokenizer, latent, layout=layout)
    ids, mask = autoencoder.tokenize(TRAIN[:8])
    losses = autoencoder.loss(ids, mask, torch.Generator().manual_seed(0))
    losses["loss"].backward()
    assert autoencoder.posterior(ids, mask).mean.shape == (8, *latent)
    assert autoencoder.logits(torch.zeros(2, *latent)).shape == (2, 14, len(tokenizer))
    for name, parameter in autoencoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.slow
def test_training_is_deterministic_and_its_state_is_left_alone(tokenizer):
    first, second, other = make(tokenizer), make(tokenizer), make(tokenizer)
    first.fit(TRAIN, TextTraining(steps=3, batch_size=16, seed=1))
    torch.rand(7)  # the global generator plays no part
    second.fit(TRAIN, TextTraining(steps=3, batch_size=16, seed=1))
    other.fit(TRAIN, TextTraining(steps=3, batch_size=16, seed=2))
    states = [autoencoder.state_dict() for autoencoder in (first, second, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert not first.training


def test_progress_is_reported_and_time_ends_training(tokenizer):
    reports = []
    make(tokenizer).fit(
        TRAIN, TextTraining(steps=5, batch_size=16), lambda step, values: reports.append((step, values)), log_every=2
    )
    assert [step for step, _ in reports] == [2, 4, 5]
    assert {"loss", "reconstruction", "kl", "token_accuracy"} <= set(reports[0][1])
    reports.clear()
    make(tokenizer).fit(
        TRAIN, TextTraining(steps=10_000, minutes=0.0, batch_size=16), lambda *step: reports.append(step), log_every=1
    )
    assert len(reports) == 1


@pytest.mark.slow
def test_training_in_bf16_is_near_that_in_float32(tokenizer):
    losses = {}
    for precision in ("no", "bf16"):
        autoencoder, values = make(tokenizer), []
        training = TextTraining(steps=20, batch_size=16, lr=5e-3, precision=precision)
        autoencoder.fit(TRAIN, training, lambda _, step_losses, values=values: values.append(step_losses), log_every=1)
        losses[precision] = [step_losses["loss"] for step_losses in values]
    assert losses["bf16"][-1] < 0.8 * losses["bf16"][0]
    assert losses["bf16"] != losses["no"], "autocast is on"
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.1)


def test_saved_autoencoder_is_the_same(trained, tmp_path):
    folder = trained.save(tmp_path / "codec")
    loaded = TextAutoencoder.load(folder)
    z = trained.encode(HELD_OUT).mean
    assert torch.equal(loaded.encode(HELD_OUT).mean, z)
    assert loaded.decode(z) == trained.decode(z)
    assert loaded.config == trained.config
    assert not list(folder.glob(".*"))
    with pytest.raises(UserError, match="no text autoencoder"):
        TextAutoencoder.load(tmp_path)


def test_evaluation_does_not_depend_on_the_batch(trained):
    together = trained.encode(HELD_OUT[:10]).mean
    alone = torch.cat([trained.encode([text]).mean for text in HELD_OUT[:10]])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("latent", [*LATENTS, (3, 32, 32), (4, 64, 64), (1, 8, 12), (77, 16)])
@pytest.mark.parametrize("length", [1, 50, 10_000])
def test_a_code_is_read_back_from_its_drawing(latent, length):
    code = Code(latent, length)
    numbers = torch.randn(2, code.size)
    drawn = code.draw(numbers)
    assert drawn.shape == (2, *latent)
    torch.testing.assert_close(code.read(drawn), numbers, atol=1e-4, rtol=1e-4)
    # what is added to the drawing is averaged over the squares
    noise = torch.randn(200, *latent, generator=torch.Generator().manual_seed(0))
    assert code.read(noise).std().item() == pytest.approx((code.size / drawn[0].numel()) ** 0.5, rel=0.3)


def test_every_token_has_a_share_of_the_latent():
    for tokens, slots in [(14, 64), (77, 77), (32, 36), (5, 5)]:
        shares = shares_of_tokens(tokens, slots)
        assert (shares.sum(1) == 1).all()
        assert (shares.sum(0) >= 1).all()


def test_code_size_is_the_nearest_that_the_shape_allows():
    sizes = {
        (latent, length): Code(latent, length).size for latent in [(3, 32, 32), (77, 16)] for length in (60, 160, 500)
    }
    assert sizes[(3, 32, 32), 60] == 48
    assert sizes[(3, 32, 32), 160] == 192
    assert sizes[(3, 32, 32), 500] == 768
    assert sizes[(77, 16), 160] == 176


def test_latents_made_elsewhere_are_read_patch_by_patch(tokenizer):
    class Fixed(TextAutoencoder):
        def posterior(self, ids, mask):
            return super().posterior(ids, mask)

    assert make(tokenizer).layout == "code"
    assert Fixed(tokenizer, (1, 16, 16), TextAutoencoderConfig(**SMALL)).layout == "patches"
    assert make(tokenizer, layout="patches").layout == "patches"


def test_an_epoch_shows_every_caption_once():
    rows = torch.cat([batch_rows(12, 4, seed=0, step=step) for step in range(3)])
    assert rows.sort().values.tolist() == list(range(12))
    assert not torch.equal(rows[:4], batch_rows(12, 4, seed=0, step=3))


def test_user_errors(tokenizer):
    with pytest.raises(UserError, match="not \\(8,\\)"):
        make(tokenizer, (8,))
    with pytest.raises(UserError, match="holds none"):
        make(tokenizer).fit([])


@pytest.mark.slow
def test_scene_captions_survive():
    """With the autoencoder of `caption_tiny`, trained for a tenth of its time."""
    from crossflow.data.scenes import captions, make_scene, scene_seed
    from crossflow.tasks import load_config

    train, held_out = (
        [captions(make_scene(scene_seed(split, index)))[1] for index in range(count)]
        for split, count in (("train", 2000), ("val", 200))
    )
    config = load_config("caption_tiny").caption.autoencoder
    torch.manual_seed(0)
    autoencoder = TextAutoencoder(build_tokenizer(train, max_length=config.max_length), (3, 32, 32), config)
    autoencoder.fit(train, TextTraining(steps=100, batch_size=24, lr=5e-3))
    for noise in (0.0, 0.5):
        report = autoencoder.evaluate(held_out, noise=noise)
        assert report.token_accuracy >= 0.99
        assert report.exact_match >= 0.95
