"""The text cleaning that the released T5 models were trained with.

The rules and their order are the release's, even where they cut into words: "lighting.concept art" loses what looks
like an address. Two steps differ without effect on ordinary captions: the release repairs wrongly decoded text with the
ftfy library, here characters are composed (NFC); and markup is removed by a pattern instead of a parser.
"""

import html
import re
import unicodedata
from urllib.parse import unquote_plus


def clean_text(text: str) -> str:
    """`text` in lower case, without addresses, file names, markup, product codes and advertising, with plain quotes
    and dashes. The rules are applied twice, as in the release, since the first pass leaves spaces at the ends.

    >>> clean_text("A Photo of a Cat, see www.example.com")
    'a photo of a cat, see'
    """
    return _clean_once(_clean_once(text))


def _clean_once(text: str) -> str:
    text = html.unescape(_replace(unquote_plus(text).strip().lower(), _MARKUP))
    text = _replace(text, _CHARACTERS + _CLUTTER)
    if len(re.findall(r"[-_]", text)) > 3:  # a-file-name-like-this
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text))).strip()
    return _replace(text, _ADVERTISING + _ENDS).strip()


def _replace(text: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text


_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_ADDRESS = r"\b((?:%s:(?:/{1,3}|[a-z0-9%%])|[a-z0-9.\-]+\.(?:com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@)))"
_MARKUP = [
    ("<person>", "person"),
    (_ADDRESS % "https?", ""),
    (_ADDRESS % "www", ""),
    (r"<!--.*?-->|</?[a-z!][^>]*>", ""),
]
_CHARACTERS = [
    (r"@\w+\b", ""),
    (r"[\u31c0-\u4dff\u4e00-\u9fff]", ""),  # Chinese characters, which the encoder was not trained on
    (
        r"[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63"
        r"\uff0d]+",
        "-",
    ),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
]
_CLUTTER = [
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # network addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),  # article numbers
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.({_FILE_TYPES})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_ADVERTISING = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # product codes
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(for|on)\s\w+", ""),
    (rf"\b({_FILE_TYPES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes such as 1920x1080
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
]
_ENDS = [  # in the first pass, spaces at the ends keep these from matching
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
]
