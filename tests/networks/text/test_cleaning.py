"""The text cleaning of the released T5 models."""

import pytest

from crossflow.networks.text.cleaning import clean_text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A Photo of a Cat ", "a photo of a cat"),
        ("see https://example.com/cat now", "see now"),
        ("see https://example.com/cat.html now", "see html now"),  # what is left of it after the address
        ("visit www.foo.de today", "visit www. foo. de today"),
        ("dramatic lighting.concept art, 8k", "dramatic art, 8k"),
        ("a lamp \u2e40 free shipping", "a lamp"),
        ("<b>bold</b> cat &amp; dog", "bold cat dog"),
        ("“curly” — dash", '"curly" - dash'),
        ("red-car-in-the-street-photo.jpg", ""),
        ("red_car_in_the_street", "red car in the street"),
        ("free shipping a lamp 1920x1080", "a lamp"),
        ("hello,world", "hello, world"),
        ("cafe\u0301 table", "café table"),
        ("cat (sitting) [on] mat...", "cat sitting on mat"),
        ("", ""),
    ],
)
def test_cleaning_removes_all_but_the_words(text, cleaned):
    assert clean_text(text) == cleaned
    assert clean_text(cleaned) == cleaned
