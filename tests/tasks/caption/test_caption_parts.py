"""What captioning learns before its flow."""

import pytest

from crossflow.tasks import load_config, task_class
from crossflow.tasks.caption.decoder import TextAutoencoder


@pytest.mark.slow
def test_the_text_autoencoder_is_evaluated_on_captions_it_was_not_trained_on(
    tiny_settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: dict[str, list[str]] = {}
    fit, evaluate = TextAutoencoder.fit, TextAutoencoder.evaluate

    def recorded_fit(self, captions, *args, **kwargs):
        texts["train"] = list(captions)
        return fit(self, captions, *args, **kwargs)

    def recorded_evaluate(self, captions, *args, **kwargs):
        texts["evaluated"] = list(captions)
        return evaluate(self, captions, *args, **kwargs)

    monkeypatch.setattr(TextAutoencoder, "fit", recorded_fit)
    monkeypatch.setattr(TextAutoencoder, "evaluate", recorded_evaluate)
    config = load_config("caption_tiny", tiny_settings("caption"))
    adapter = task_class("caption")
    adapter.learn(config, adapter.dataset(config, "train"), lambda line: None)
    validation = set(adapter.dataset(config, "val", limit=len(texts["evaluated"])).captions())
    assert texts["evaluated"]
    assert set(texts["evaluated"]) <= validation
    assert texts["evaluated"] != texts["train"][: len(texts["evaluated"])]
