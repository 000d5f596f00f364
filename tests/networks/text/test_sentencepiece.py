"""T5 as it is published: its tokenizer is a SentencePiece file alone, without the converted form of it."""

import json

import torch

from crossflow.networks.text.frozen_encoder import FrozenTextEncoder, TextEncoderSettings

PROMPTS = ["a red cube", "a blue sphere", "two green cones", "a small yellow cube behind a large grey cylinder"]


def test_t5_with_a_sentencepiece_file_is_read(tmp_path):
    import sentencepiece
    import transformers

    (tmp_path / "text.txt").write_text("\n".join(PROMPTS * 8))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "spiece.vocab").unlink()
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=256, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    marks = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 100}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**marks, "tokenizer_class": "T5Tokenizer"}))

    encoder = FrozenTextEncoder.load(TextEncoderSettings(str(tmp_path), max_length=77, scale=10.0))
    ids, mask = encoder.tokenizer(PROMPTS[0])["input_ids"], encoder([PROMPTS[0]])[1]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert ids == [*pieces.encode(PROMPTS[0]), 1]
    assert mask.shape == (1, 77)
    assert int(mask.sum()) == len(ids)
