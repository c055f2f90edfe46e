"""What a dataset's trigger word does in its captions, and what to write into sample prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets.caption_operations import Kind, Operation, word_pattern
from datasets.models import Dataset
from datasets.picture_filters import foreign_triggers, leaking, with_tag, without_trigger

PROMPT_TAGS = 3


@dataclass(frozen=True)
class TriggerReport:
    """`missing`: captions without the word. `leaking`: captions that have it inside another word, or that have the
    trigger word of another dataset of the same owner (one of `foreign`)."""

    trigger_word: str
    missing: int = 0
    leaking: int = 0
    foreign: list[str] = field(default_factory=list)
    sample_prompts: list[str] = field(default_factory=list)


def trigger_report(dataset: Dataset, *, tags: list[tuple[str, int]]) -> TriggerReport:
    """`tags`: those of the dataset with their counts, the most frequent first; sample prompts are made of them."""
    foreign = foreign_triggers(dataset)
    return TriggerReport(
        dataset.trigger_word,
        missing=dataset.pictures.filter(without_trigger(dataset)).count(),
        leaking=dataset.pictures.filter(leaking(dataset, foreign)).count(),
        foreign=foreign,
        sample_prompts=sample_prompts(dataset.trigger_word, tags),
    )


def sample_prompts(trigger_word: str, tags: list[tuple[str, int]]) -> list[str]:
    """The trigger word alone, and with tags that go with it often. Empty without a trigger word."""
    if not trigger_word:
        return []
    others = [tag for tag, count in tags if count > 1 and tag.casefold() != trigger_word.casefold()]
    return [trigger_word, *(f"{trigger_word}, {tag}" for tag in others[:PROMPT_TAGS])]


def replacement_of(dataset: Dataset, *, old: str) -> tuple[Operation, int]:
    """The edit of many captions that replaces the trigger word from before by the dataset's, and how many captions
    have it: as a tag where it stands between commas in all of them, as text otherwise."""
    count = dataset.pictures.filter(caption__iregex=word_pattern([old])).count()
    is_tag = count == dataset.pictures.filter(with_tag(old)).count()
    return Operation(Kind.RENAME if is_tag else Kind.REPLACE, old, dataset.trigger_word), count
