"""Captions into words, as the COCO caption evaluation does it, without Java.

The official evaluation runs Stanford's PTBTokenizer 3.4.1 with lower-casing and drops the tokens of `PUNCTUATION`. This
is a scanner of our own with the same behaviour, found by comparing outputs: at every position all rules are tried, the
longest match wins (what follows a token and is only looked at counts), the earlier rule on a tie.

Kept on purpose, because published scores contain them: brackets become `-lrb-` and the like and are *not* dropped,
as the official list names them in capitals; runs such as "!!" and "*" stay as words; characters the scanner does not
know (emoji, every character outside the basic plane, zero-width spaces) end a word and vanish.

On the 40,455 captions of Flickr8k no caption differs; of captions damaged at random (punctuation, accents, capitals and
markup thrown in) about 1 in 40,000 does. What differs from Java:
- A caption stands alone. The official tool writes all captions into one file, and the word before a full stop that ends
  a caption ("vitamin a.", "p.") can depend on the first letter of the next caption.
- Line breaks of any kind are spaces; there some of them end the line and shift all later captions.
- Letters that Unicode gained after version 6 (505 in rare scripts) are letters; there they vanish.
- Some corners nobody writes: `eu-u.s` without its last full stop, entities in mixed case, `<br/  >`, `cont'd.`.

Reference: Penn Treebank tokenization, https://www.cis.upenn.edu/~treebank/tokenization.html
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)

# Code points (hexadecimal) that belong to words without being letters, and that are words of their own; as observed.
MARKS = """2C2-2C5 2D2-2DF 2E5-2EB 2ED 2EF-36F 375 378-379 384-385 3F6 483-487 55A-55F 591-5BD 5BF 5C1-5C2 5C4-5C5 5C7
615-61A 64B-65E 670 6D6-6E4 6E7-6ED 6FD-6FE 70F 711 730-74C 7A6-7B0 7EB-7F3 900-903 93C 93E-94E 951-955 962-963 981-983
9BC 9BE-9C4 9C7-9C8 9CB-9CD 9D7 9E2-9E3 A01-A03 A3C A3E-A4F A81-A83 ABC ABE-ACF B82 BBE-BC2 BC6-BC8 BCA-BCD C01-C03
C3E-C56 D3E-D44 D46-D48 E31 E34-E3A E47-E4E EB1 EB4-EBC EC8-ECD 1885-1886"""
SYMBOLS = """A1 A5-A9 AC AE-B1 B4 B6-B8 BF D7 F7 37E 387 589 5BE 5C0 5C3 5C6 5F3-5F4 600-603 606-60C 614 61B 61E-61F 66A
66D 6D4 700-70D 7F6-7F8 964-965 E3F E4F 1FBD 2016-2017 201A 201E-2023 2030-2038 203B 203E-2042 2044 20A4 2100-2101
2103-2106 2108-2109 2114 2116-2118 211E-2123 2125 2127 2129 212E 213A-213B 2140-2144 214A-214D 214F 2155-215E 2190-24B5
24D0-2BFF 3001-3002 3012 30FB FF01-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF65 FFE0-FFE1 FFE5-FFE6"""

# Abbreviations that keep their full stop: anywhere; not in front of letters; only before a number.
TITLES = """
mr mrs ms mme mlle dr drs prof profs sen sens rep reps gov govs gen maj col cpl lt lieut capt sgt sfc spc pfc
pvt adm cmdr comdr brig ens atty hon rev msgr messrs supt pres insp det asst assoc treas st ste mt ft ph vs cf
wm jos alex adj adv ave cie dept elec invt mfg mtg natl"""
ABBREVIATIONS = """
al co cos ct ga jr ky md mo rd rt sq sr va vt ala apr aug bhd dak dec esq est etc ext feb fla fri inc ind jan
jul jun kan kans ltd mar mon neb nev nov oct plc pte ptes pty ptys ppte pptes ppty pptys sep sept seq sys tel
thu thurs tue tues wed wis wisc wyo ariz assn bancorp bldg blvd bros calif colo conn corp intl mich minn mont
okla penn tenn univ ph\\.d ed\\.d"""
BEFORE_NUMBERS = "ca no nos op pp art fig figs prop"
# A single letter with a full stop is an initial ("U. Miami"), unless one of these begins the next sentence.
SENTENCE_STARTS = """
a about according additionally after an as at but earlier he her here however if in it last many more now once
one other our she since so some such that the their then there these they this we what when while yet you"""

FILE_ENDINGS = """
bat bmp c cgi class cpp dll docx? exe gif gz html? h jar java jpe?g mov mp3 pdf php pl png ppt ps py sql tar txt
wav xml x zip"""

Action = Callable[[str], str | None]


def tokenize(caption: str) -> str:
    """The words of a caption in lower case with one space between them, punctuation left out; any text is accepted."""
    return " ".join(token for token in scan(caption) if token not in PUNCTUATION)


def scan(caption: str) -> list[str]:
    """All tokens of a caption in lower case, punctuation included.

    A number with a fraction, a telephone number or a markup tag holds no-break spaces, as in the original.
    """
    plain, rules = _scanner()
    tokens: list[str] = []
    position = 0
    while position < len(caption):
        match = plain.match(caption, position)
        if match is not None:  # a plain word between spaces: no other rule could match more
            tokens.append(match[1].lower())
            position = match.end()
            continue
        best, action = None, None
        for rule, rule_action in rules:
            match = rule.match(caption, position)
            if match is not None and (best is None or match.end() > best.end()):
                best, action = match, rule_action
        if best is None:
            position += 1  # nothing known: it vanishes
            continue
        text = best[best.lastindex or 1]
        token = action(text) if action is not None else text
        if token:
            tokens.append(token.lower())
        position = best.end(best.lastindex or 1)
    return tokens


def _as(replacement: str) -> Action:
    return lambda token: replacement


def _brackets(token: str) -> str:
    for bracket, name in (
        ("(", "-LRB-"),
        (")", "-RRB-"),
        ("[", "-LSB-"),
        ("]", "-RSB-"),
        ("{", "-LCB-"),
        ("}", "-RCB-"),
    ):
        token = token.replace(bracket, name)
    return token


def _parentheses(token: str) -> str:
    return token.replace("(", "-LRB-").replace(")", "-RRB-").replace(" ", "\u00a0")


def _no_break(token: str) -> str:
    return token.replace(" ", "\u00a0")


def _apostrophe(token: str) -> str:
    return _quotes(re.sub("&apos;", "'", token))


def _word(token: str) -> str:
    return token.replace("\u00ad", "")


def _hyphens(token: str) -> str:
    return "--" if 3 <= len(token) <= 4 else token


def _fraction(token: str) -> str:
    return {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}.get(token, token)


def _quotes(token: str) -> str:
    """ASCII forms of curly and angle quotes."""
    for some, plain in (
        ("[\u0091\u2018\u201b\u2039]", "`"),
        ("[\u0092\u2019\u203a]", "'"),
        ("[\u0093\u201c\u00ab]", "``"),
        ("[\u0094\u201d\u00bb]", "''"),
    ):
        token = re.sub(some, plain, token)
    return token


Rule = tuple[str, Action | None]
"""A pattern whose group 1 is the token, what is matched behind it only looked at; and how the token is rewritten."""


class _Patterns(NamedTuple):
    """Patterns that the rules are composed of."""

    letter: str
    alnum: str
    d: str
    space: str
    apostrophe: str
    any_apostrophe: str
    word: str
    clitic: str
    acronym: str
    number: str
    name: str
    address: str
    address_end: str
    host: str
    bare_host: str
    mail: str
    domain: str
    irish: str
    joined: str
    hyphened: str
    chunk: str
    insentence: str


def _patterns() -> _Patterns:
    digits = _character_class(lambda c: unicodedata.category(c) == "Nd")
    letters = _character_class(lambda c: unicodedata.category(c).startswith("L"))
    letter = f"(?:[{letters}{_ranges(MARKS)}\u00ad]|&[aeiouAEIOU](?i:acute|grave|uml);)"
    alnum = f"[{letters}{digits}]"
    d = f"[{digits}]"
    space = "[ \t\u00a0\u2000-\u200a\u3000]"
    apostrophe = "(?:['\u0092\u2019]|(?i:&apos;))"
    any_apostrophe = "(?:['\u0092\u2019`\u0091\u2018\u201b]|(?i:&apos;))"
    word = rf"{letter}(?:{letter}|{d})*(?:[.!?]{letter}(?:{letter}|{d})*)*"
    clitic = rf"{apostrophe}(?i:[msd]|re|ve|ll)"
    acronym = r"[A-Za-z](?:\.[A-Za-z])+"
    number = rf"(?:{d}*(?:[.:,\u00ad\u066b\u066c]{d}+)+|{d}+)"
    name = r"[A-Za-z][A-Za-z0-9_:.-]*"
    address = r"[^ \t\n\f\r\"<>|(){}]"
    address_end = r"[^ \t\n\f\r\"<>|.!?(){},-]"
    host = r"[^ \t\n\f\r\"<>|.!?(){},]"
    bare_host = r"[^ \t\n\f\r\"`'<>|.!?(){},-_$]"  # from the comma to the underscore: no slash, colon or capital
    mail = '[^ \t\n\f\r"<>|(){}\u00a0]'
    domain = '[^ \t\n\f\r"<>|(){}.\u00a0]'
    irish = rf"[dDoOlL]{any_apostrophe}{alnum}{{2,}}"  # O'Neil, o'clock, d'art
    joint = "[-_\u058a\u2010\u2011]"
    joined = rf"(?:{irish}|{alnum}+)(?:{joint}(?:{irish}|{alnum}+))+"
    hyphened = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]{{0,200}}(?:-(?:{acronym}\.|[A-Za-z0-9\u00ad]+))+"
    chunk = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"  # of and/or, 1/2-full
    insentence = "[,;:\u3001]"
    return _Patterns(
        letter=letter,
        alnum=alnum,
        d=d,
        space=space,
        apostrophe=apostrophe,
        any_apostrophe=any_apostrophe,
        word=word,
        clitic=clitic,
        acronym=acronym,
        number=number,
        name=name,
        address=address,
        address_end=address_end,
        host=host,
        bare_host=bare_host,
        mail=mail,
        domain=domain,
        irish=irish,
        joined=joined,
        hyphened=hyphened,
        chunk=chunk,
        insentence=insentence,
    )


def _contractions(p: _Patterns) -> list[Rule]:
    """Assimilated words come apart; the rest of the word is scanned again."""
    return [
        (r"(?i:(can)not|(gon)na|(got)ta|(lem)me|(gim)me|(wan)na)", None),
        (r"(?i:('t)(?:is|was))", None),
    ]


def _markup(p: _Patterns) -> list[Rule]:
    """Tags, dashes and entities."""
    return [
        (
            rf"(<(?:[!?][A-Za-z-][^>\r\n]*"
            rf"|/?{p.name}(?:[ ]+(?:{p.name}[ ]*=[ ]*(?:'[^']*'|\"[^\"]*\")|{p.name}))*[ ]*/?)>)",
            _no_break,
        ),
        (r"([\u0096\u0097\u2013-\u2015]|&(?i:MD|mdash|ndash);)", _as("--")),
        (r"(?i:(&amp;))", _as("&")),
        (r"(&(?i:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);)", None),
    ]


def _words(p: _Patterns) -> list[Rule]:
    """Words, with what an apostrophe cuts off."""
    return [
        (rf"({p.word}){p.clitic}", _word),
        (rf"([A-Za-z\u00ad]*[A-MO-Za-mo-z\u00ad])[nN]{p.any_apostrophe}[tT]", _word),
        (rf"({p.word})", _word),
        (
            rf"(?i:({p.apostrophe}n{p.apostrophe}?|[ldj]{p.apostrophe}|dunkin{p.apostrophe}|somethin{p.apostrophe}|ol{p.apostrophe}"
            rf"|{p.apostrophe}em|{p.apostrophe}till?|{p.apostrophe}cause|cap{p.apostrophe}n|c{p.apostrophe}est|c['`]mon"
            r"|s'mores|ev'ry|li'l|nat'l|e'er))",
            None,
        ),
        (rf"((?i:y){p.apostrophe}){p.letter}", None),
        (
            rf"([A-HJ-XZn]{p.any_apostrophe}{p.letter}{{2,}}|{p.letter}+[aeiouyAEIOUY]{p.any_apostrophe}[aeiouA-Z]{p.letter}*)",
            None,
        ),
    ]


def _addresses(p: _Patterns) -> list[Rule]:
    """Addresses of pages and people, and hash tags."""
    return [
        (rf"((?i:https?)://{p.address}+{p.address_end})", None),
        (
            rf"((?:(?i:www)\.(?:{p.host}+\.)+[A-Za-z]{{2,4}}|(?:{p.bare_host}{{1,100}}\.){{1,20}}(?i:com|net|org|edu))(?:/{p.address}+{p.address_end})?)",
            None,
        ),
        (rf"((?:&lt;|<)?[A-Za-z0-9]{p.mail}{{0,200}}@(?:{p.domain}+\.)*{p.domain}+(?:&gt;|>)?)", None),
        (r"(@[A-Za-z_][A-Za-z_0-9]*)", None),
        (rf"(#{p.letter}+)", None),
        (rf"({p.clitic})(?:[^A-Za-z]|$)", _apostrophe),
        (rf"([nN]{p.any_apostrophe}[tT])(?:[^A-Za-z]|$)", _apostrophe),
    ]


def _numbers(p: _Patterns) -> list[Rule]:
    """Dates, numbers, fractions, telephone numbers, currencies."""
    return [
        (rf"({p.d}{{1,2}}[-/]{p.d}{{1,2}}[-/]{p.d}{{2,4}})", None),
        (rf"([-+]?{p.number})", None),
        (r"([\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+))", None),
        (rf"((?:{p.d}{{1,4}}[- \u00a0])?{p.d}{{1,4}}[/\u2044]{p.d}{{1,4}})", _no_break),
        (r"([\u00bc-\u00be\u2153-\u215e])", _fraction),
        (r"(?i:(-(?:RRB|LRB|RCB|LCB|RSB|LSB)-|C\.D\.s|pro-|anti-|S(?:&|&amp;)P-500|S(?:&|&amp;)Ls))", None),
        (rf"({p.apostrophe}[2-9]0[sS])", None),
        (rf"({p.apostrophe}[0-9][0-9])(?:{p.space}|$)", None),
        (rf"({p.chunk}(?:\\?/{p.chunk}){{1,2}})", None),
        (
            r"(\([0-9]{2,3}\) ?[0-9]{3,4}[- ]?[0-9]{3,5}"
            r"|\+?(?:[0-9]{2,4}[- ])?[0-9]{2,4}[- ][0-9]{3,4}[- ]?[0-9]{3,5})",
            _parentheses,
        ),
        (r"([A-Z]*\$|#)", None),
        ("(\u00a2)", _as("cents")),
        ("(\u00a3)", _as("#")),
        ("([\u0080\u00a4\u20a0\u20ac])", _as("$")),
    ]


def _abbreviations(p: _Patterns) -> list[Rule]:
    """What keeps its full stop."""
    return [
        (rf"((?i:{_any(ABBREVIATIONS)})\.)(?:[\s\S]{{2}}|$)", None),
        (rf"((?i:{_any(ABBREVIATIONS)})\.)", None),
        (rf"((?i:{_any(TITLES)})\.)", None),
        (rf"((?i:{_any(BEFORE_NUMBERS)})\.){p.space}?{p.d}", None),
        (rf"({p.acronym}\.)", None),
        (rf"({p.alnum}+(?:\.{p.alnum}+)*\.(?i:{_any(FILE_ENDINGS)}))(?:{p.space}|[.,;:?!]|$)", None),
        (rf"([A-Za-z])\.{p.space}+(?=[A-Z])(?i:{_any(SENTENCE_STARTS)})(?:{p.space}|$)", None),
        (r"([A-Za-z]\.)", None),
        (rf"({p.word}\.){p.insentence}", None),
        (rf"({p.alnum}+\.){p.insentence}", None),
        (rf"({p.joined}\.){p.insentence}", None),
        (rf"({p.hyphened}\.){p.insentence}", None),
    ]


def _marks(p: _Patterns) -> list[Rule]:
    """Faces, brackets, runs of marks, and compounds."""
    return [
        (r"([<>]?[:;=]['\-o*]?[()DPdpO\\{@|\[\]]|:3)(?:[^A-Za-z0-9]|$)", _parentheses),
        (r"([-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.-]?[-^x=~<>']\))", _parentheses),
        (r"([()\[\]{}])", _brackets),
        (r"(<<|>>|[<>])", None),
        (r"(?i:(&lt;))", _as("<")),
        (r"(?i:(&gt;))", _as(">")),
        (r"(?i:(&nbsp;))", _as("")),
        (r"(-+)", _hyphens),
        (r"(\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u0085\u2026])", _as("...")),
        (r"(@+|#+|_+|\*+|(?:\\\*){1,3})", None),
        (r"([?!]+)", None),
        (rf"([-.,;:=/%&+~|\\^$\u3001\u207a\u207b\u208a\u208b]|[{_ranges(SYMBOLS)}])", None),
        (r"([cCfF]#|[cC]\+\+)", None),
        (rf"({p.joined})", _word),
        (rf"({p.hyphened})", _word),
        (rf"({p.irish})", _word),
        (rf"({p.alnum}+)", _word),
        (r"([A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)", lambda token: token.replace("&amp;", "&")),
    ]


def _quotation_marks(p: _Patterns) -> list[Rule]:
    """Opening and closing quotation marks."""
    return [
        (r"(\"|(?i:&quot;))[A-Za-z0-9$]", _as("``")),
        (r"(\"|(?i:&quot;))", _as("''")),
        (r"(')[A-Za-z][^ \t\n\r\u00a0]", _as("`")),
        (rf"({p.clitic})", _apostrophe),
        (rf"(''|[`\u0082\u0084\u0091-\u0094\u00ab\u00bb\u2018-\u201f\u2039\u203a]{{1,2}}|{p.apostrophe})", _quotes),
    ]


@cache
def _scanner() -> tuple[re.Pattern[str], list[tuple[re.Pattern[str], Action | None]]]:
    """The rule for plain words, and all rules in the order in which they win ties."""
    patterns = _patterns()
    groups = (_contractions, _markup, _words, _addresses, _numbers, _abbreviations, _marks, _quotation_marks)
    rules = [(re.compile(pattern), action) for group in groups for pattern, action in group(patterns)]
    return re.compile(r"(?!(?:cannot|gonna|gotta|lemme|gimme|wanna)\b)([A-Za-z]+)(?: |$)", re.IGNORECASE), rules


def _any(words: str) -> str:
    return "|".join(words.split())


def _ranges(text: str) -> str:
    """Hexadecimal ranges as the inside of a character class."""
    return "".join("-".join(re.escape(chr(int(end, 16))) for end in span.split("-")) for span in text.split())


def _character_class(belongs: Callable[[str], bool]) -> str:
    """The characters of the basic plane for which `belongs` holds, as the inside of a character class."""
    spans: list[list[int]] = []
    for code in range(0x10000):
        if 0xD800 <= code < 0xE000 or not belongs(chr(code)):
            continue
        if spans and spans[-1][1] == code - 1:
            spans[-1][1] = code
        else:
            spans.append([code, code])
    return "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in spans)
