"""What captions say wrongly, or cannot teach. Plain text in, findings out; no database here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from datasets.caption_operations import has_word

TOKENS_AT_ONCE = 75  # of CLIP; what is longer is cut off, unless the run reads 150 or 225
TOKENS_A_WORD = 1.3  # of English prose
LEAST_TO_COMPARE = 3  # captions, before anything is said to be in all of them

# Tags that cannot both be true of one picture.
CONTRADICTIONS = (
    ("1girl", "2girls"),
    ("1girl", "multiple girls"),
    ("1boy", "2boys"),
    ("1boy", "multiple boys"),
    ("solo", "2girls"),
    ("solo", "2boys"),
    ("solo", "multiple girls"),
    ("solo", "multiple boys"),
    ("solo", "group"),
    ("day", "night"),
    ("indoors", "outdoors"),
    ("long hair", "short hair"),
    ("open mouth", "closed mouth"),
    ("open eyes", "closed eyes"),
    ("standing", "sitting"),
    ("from front", "from behind"),
    ("from above", "from below"),
    ("close-up", "full body"),
    ("portrait", "full body"),
    ("monochrome", "colorful"),
    ("black and white", "colorful"),
    ("no humans", "1girl"),
    ("no humans", "1boy"),
)
# Words that say nothing about a picture.
SMALL_WORDS = {
    "a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "her", "his", "in", "is", "it", "its", "of", "on",
    "or", "that", "the", "their", "this", "to", "was", "were", "with",
}  # fmt: skip
_PIECES = re.compile(r"[^\W\d_]+|\d|[^\s\w]+|_")


@dataclass
class Findings:
    """Places in the list of captions, by what was found there."""

    empty: list[int] = field(default_factory=list)
    without_trigger: list[int] = field(default_factory=list)
    contradictory: list[tuple[int, str, str]] = field(default_factory=list)
    repeated: list[tuple[int, list[str]]] = field(default_factory=list)
    long: list[tuple[int, int]] = field(default_factory=list)
    """(place, about how many CLIP tokens)."""
    in_all: list[str] = field(default_factory=list)
    """What each caption says, whatever the picture: it is learnt with the trigger word."""


def lint(captions: Sequence[str], *, trigger_word: str) -> Findings:
    found = Findings()
    for place, caption in enumerate(captions):
        _lint_one(found, place, caption, trigger_word)
    found.in_all = _in_all([caption for caption in captions if caption], trigger_word)
    return found


def tags_of(caption: str) -> list[str]:
    """In small letters, underscores as spaces."""
    return [tag for part in caption.split(",") if (tag := " ".join(part.casefold().replace("_", " ").split()))]


def about_tokens(caption: str) -> int:
    """CLIP tokens, estimated: a word is 1.3, a digit or a run of signs is one."""
    pieces: list[str] = _PIECES.findall(caption)
    words = sum(piece.isalpha() for piece in pieces)
    return len(pieces) + round(words * (TOKENS_A_WORD - 1))


def _lint_one(found: Findings, place: int, caption: str, trigger_word: str) -> None:
    if not caption:
        found.empty.append(place)
        return
    tags = tags_of(caption)
    if trigger_word and not has_word(caption, trigger_word):
        found.without_trigger.append(place)
    said = set(tags)
    found.contradictory += [(place, one, other) for one, other in CONTRADICTIONS if one in said and other in said]
    if repeated := [tag for tag, count in Counter(tags).items() if count > 1]:
        found.repeated.append((place, repeated))
    if (tokens := about_tokens(caption)) > TOKENS_AT_ONCE:
        found.long.append((place, tokens))


def _in_all(captions: list[str], trigger_word: str) -> list[str]:
    """Tags, or words where captions are sentences, in the order of the first caption."""
    if len(captions) < LEAST_TO_COMPARE:
        return []
    are_tags = sum(len(tags_of(caption)) > 2 for caption in captions) * 2 > len(captions)
    each = [list(_said(caption, trigger_word, are_tags=are_tags)) for caption in captions]
    common = set(each[0]).intersection(*each[1:])
    return [said for said in dict.fromkeys(each[0]) if said in common]


def _said(caption: str, trigger_word: str, *, are_tags: bool) -> Iterable[str]:
    rest = (
        re.sub(rf"(?<!\w){re.escape(trigger_word)}(?!\w)", "", caption, flags=re.IGNORECASE)
        if trigger_word
        else caption
    )
    if are_tags:
        return tags_of(rest)
    return (word for word in re.findall(r"[\w'-]+", rest.casefold()) if word not in SMALL_WORDS)
