"""What captions lose and what they must have (paper section 4.1): colour, shape and texture words go, the label stays findable.

`shards.contains_label` and `find_label_tokens` look for the label as it is written, whole words in a row: so that is what a
filtered caption is made to hold. A caption that has the plural only is worded again, as a mask is of one subject.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from datamodules.openimages.config import CaptionConfig
from datamodules.shards import contains_label

WORDS = Path(__file__).parent / "words"
READ_PIECES, PIECE = 50, re.compile(rb"[A-Za-z]{1,8}|[^A-Za-z]")
TOKEN = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]")

#: Go together with the word that they stand before or between.
MODIFIERS = frozenset(["light", "dark", "bright", "pale", "deep", "soft", "vivid", "mostly", "all", "very"])
JOINTS = frozenset(("and", "or", ",", "&"))
#: Mean nothing without what followed: "a cat in black" ends as "a cat".
DANGLING = frozenset((
    "a", "an", "the", "in", "of", "with", "is", "are", "was", "and", "or", "made", "dressed", "covered", "painted", ",", "&",
    "its", "their",
))
#: After one of these no noun is coming: the listed word before it was the noun itself ("an orange on a table") or a predicate.
CLOSERS = frozenset((
    "on", "in", "at", "of", "with", "from", "by", "to", "over", "under", "near", "next", "behind", "beside", "between", "into",
    "onto", "through", "for", "is", "are", "was", "were", "has", "have", "sits", "sitting", "stands", "standing", "lies", "lying",
    "laying", "and", "or", "that", "which", "while", "as", ".", ",", ";", "!", "?", "against", "around", "above", "below",
    "inside", "outside",
))
#: Words that are things too: after an article, and with no noun to follow, they stay.
THINGS = frozenset((
    "orange", "rose", "diamond", "square", "glass", "stone", "iron", "copper", "salmon", "olive", "violet", "lavender", "coral",
    "straw", "rust", "spiral", "lace", "wood", "gold", "silver",
))

IRREGULAR = {"fish": "fish", "sheep": "sheep", "deer": "deer", "mouse": "mice", "goose": "geese", "knife": "knives", "man": "men", "woman": "women",
             "loaf": "loaves", "scarf": "scarves", "shelf": "shelves", "leaf": "leaves", "ox": "oxen", "person": "people", "aircraft": "aircraft"}


class CaptionError(ValueError):
    """A caption that cannot be used; the message is the reason's name."""


@dataclass(frozen=True)
class CaptionRules:
    """CaptionConfig with its word lists read."""

    removed: frozenset[str]
    people: frozenset[str]
    missing_label: str
    label_sentence: str

    @classmethod
    def of(cls, config: CaptionConfig) -> "CaptionRules":
        removed = frozenset().union(*(read_words(name) for name in config.word_lists))
        people = read_words(config.people_words) if config.people_words else frozenset()
        if "{label}" not in config.label_sentence and "{a_label}" not in config.label_sentence:
            raise ValueError(f"captions.label_sentence needs {{label}} or {{a_label}}: {config.label_sentence!r}")
        return cls(removed, people, config.missing_label, config.label_sentence)


def read_words(name: str) -> frozenset[str]:
    """A word list: one word a line, # begins a comment. Raises FileNotFoundError or ValueError that name the file."""
    path = WORDS / name if "/" not in name else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a word list of captions.word_lists or captions.people_words")
    lines = (line.partition("#")[0].strip().lower() for line in path.read_text(encoding="utf-8").splitlines())
    words = frozenset(filter(None, lines))
    spaced = sorted(word for word in words if " " in word)
    if spaced:
        raise ValueError(f"{path}: one word a line, not {spaced[:3]}")
    return words


def finish(raw: str | bytes, label: str, rules: CaptionRules) -> tuple[str, str]:
    """A caption before (tidied only) and after the filter, the label in it. Raises CaptionError with a reason."""
    full = tidy(raw)
    if not full:
        raise CaptionError("caption_empty")
    if any(re.sub("['\u2019]s$", "", word.lower()) in rules.people for word in TOKEN.findall(full)):  # "a man's hat" too
        raise CaptionError("caption_has_people")
    return full, with_label(filter_words(full, label, rules.removed), label, rules)


def tidy(raw: str | bytes) -> str:
    """One line of text. Raises CaptionError for bytes that are not UTF-8."""
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        text.encode("utf-8")
    except UnicodeError as error:
        raise CaptionError("caption_not_utf8") from error
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def filter_words(caption: str, label: str, removed: frozenset[str]) -> str:
    """Take out whole words of `removed`, in any case, but for the label's own; mend articles and what else is left hanging."""
    tokens = TOKEN.findall(caption)
    lower = [token.lower() for token in tokens]
    own = label_places(lower, label)
    gone = {i for i, word in enumerate(lower) if i not in own and _is_listed(word, removed) and not _is_thing(lower, i, removed)}
    if not gone:
        return caption
    gone |= _companions(lower, gone, own)
    return mend(tokens, gone, own)


def label_places(lower: list[str], label: str) -> set[int]:
    """Positions of the label's words, singular or plural."""
    found: set[int] = set()
    for form in (label.lower(), plural(label.lower())):
        words = TOKEN.findall(form)
        for start in range(len(lower) - len(words) + 1):
            if lower[start : start + len(words)] == words:
                found |= set(range(start, start + len(words)))
    return found


def with_label(caption: str, label: str, rules: CaptionRules) -> str:
    """The caption when the label stands in it where it is read, else with the label's sentence before it. Raises CaptionError("label_absent")."""
    if contains_label(beginning(caption), label):
        return caption
    if rules.missing_label == "drop":
        raise CaptionError("label_absent")
    return f"{rules.label_sentence.format(label=label, a_label=f'{article(label)} {label}')} {caption}".strip()


def beginning(caption: str) -> str:
    """The words that a text encoder reads, which cuts at 77 tokens: up to 50 pieces, as words are often two or three tokens.

    A piece is up to eight letters, or a byte of anything else: in CLIP's vocabulary a digit, or a part of a letter that is not Latin, is a token.
    """
    words, pieces = caption.split(" "), 0
    for number, word in enumerate(words):
        pieces += len(PIECE.findall(word.encode()))
        if pieces > READ_PIECES:
            return " ".join(words[:number])
    return caption


@lru_cache(maxsize=4096)
def plural(label: str) -> str:
    """The plural of the last word, regular but for the few irregular ones among OpenImages' classes."""
    head, space, last = label.rpartition(" ")
    if last in IRREGULAR:
        return head + space + IRREGULAR[last]
    if re.search(r"(s|x|z|ch|sh)$", last):
        return label + "es"
    return label[:-1] + "ies" if re.search(r"[^aeiou]y$", last) else label + "s"


def article(word: str) -> str:
    """By spelling, with the usual exceptions."""
    if re.match(r"(uni|use|euro|one\b|ukulele|unicycle)", word, re.IGNORECASE):
        return "a"
    return "an" if re.match(r"[aeiou]|hour|honest", word, re.IGNORECASE) else "a"


def mend(tokens: list[str], gone: set[int], own: set[int]) -> str:
    """The remaining tokens as a sentence: dangling words at each gap's left go too, articles fit what follows."""
    kept: list[tuple[str, bool]] = []
    gap = False
    for i, token in enumerate(tokens):
        if i in gone:
            gap = True
            continue
        if gap and token.lower() in CLOSERS:
            _drop_dangling(kept)
        kept.append((token, i in own))
        gap = False
    if gap:
        _drop_dangling(kept)
    words = [token for token, _ in kept]
    for i, word in enumerate(words[:-1]):
        if word.lower() in ("a", "an") and words[i + 1][0].isalnum():
            fitting = article(words[i + 1])
            words[i] = fitting.capitalize() if word[0].isupper() else fitting
    return _join(words)


def _drop_dangling(kept: list[tuple[str, bool]]) -> None:
    while kept and kept[-1][0].lower() in DANGLING and not kept[-1][1]:
        kept.pop()


def _join(words: list[str]) -> str:
    text = re.sub(r"\s+([.,;:!?)\]}%])", r"\1", " ".join(words))
    text = re.sub(r"([(\[{#$])\s+", r"\1", text)
    return re.sub(r"^[\s,;:.&]+|[\s,;:&]+$", "", text)


def _is_listed(word: str, removed: frozenset[str]) -> bool:
    """The word, or every part of a hyphened one ("black-and-white", "dark-blue")."""
    if word in removed:
        return True
    parts = word.split("-")
    return len(parts) > 1 and any(p in removed for p in parts) and all(p in removed | MODIFIERS | {"and", "haired", "striped"} for p in parts)


def _is_thing(lower: list[str], i: int, removed: frozenset[str]) -> bool:
    """Whether a word like "orange" is the fruit here: an article before it and nothing that it could describe after it."""
    if lower[i] not in THINGS:
        return False
    before, j = lower[i - 1] if i else "", i + 1
    while j + 1 < len(lower) and lower[j] in JOINTS and _is_listed(lower[j + 1], removed):  # "an orange and white cat", and not "an orange and green apples"
        j += 2
    if j >= len(lower) or (before in ("a", "an", "one") and re.search(r"[^isu]s$", lower[j])):
        j = i + 1
    follows = lower[j] if j < len(lower) else "."
    return follows in CLOSERS and (before in ("a", "an", "the", "one") or before in removed)


def _companions(lower: list[str], gone: set[int], own: set[int]) -> set[int]:
    """Modifiers before, and joints between, words that go."""
    more: set[int] = set()
    for i in sorted(gone):
        j = i - 1
        while j >= 0 and j not in own and lower[j] in MODIFIERS:
            more.add(j)
            j -= 1
        if j - 1 in gone and lower[j] in JOINTS:
            more.add(j)
    return more
