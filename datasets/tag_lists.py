"""Tags to choose from: those of a dataset with how often they occur, and those of a person's own list."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from django.db import transaction

from datasets.caption_operations import split_tags
from datasets.models import Dataset, TagList
from datasets.selectors import pictures_of
from lorapilot.errors import UserError
from lorapilot.models import User

MAX_FILE_BYTES = 16 * 1024**2
MAX_TAGS = 300_000
LONGEST_TAG = 200


@dataclass(frozen=True)
class Tag:
    tag: str
    count: int
    is_own: bool
    """From the person's list; otherwise from the dataset."""


def tag_counts(dataset: Dataset) -> list[tuple[str, int]]:
    """Every tag of the dataset's captions with the number of pictures that have it, the most frequent first."""
    counts: Counter[str] = Counter()
    for caption in pictures_of(dataset).order_by().values_list("caption", flat=True):
        counts.update(set(split_tags(caption)))
    return sorted(counts.items(), key=lambda found: (-found[1], found[0]))


def find_tags(user: User, *, dataset: Dataset, text: str, limit: int) -> list[Tag]:
    """Up to `limit` tags with `text` in them: the dataset's first, then those of the user's list; what begins with it
    comes before what has it inside. Underscores count as spaces."""
    wanted = _spaced(text)
    mine = [(tag, count) for tag, count in tag_counts(dataset) if wanted in _spaced(tag)]
    found = [Tag(tag, count, is_own=False) for tag, count in _best(mine, wanted)[:limit]]
    known = {_spaced(tag.tag) for tag in found}
    listed = _best(_listed(user, wanted), wanted) if wanted and len(found) < limit else []
    found += [Tag(tag, count, is_own=True) for tag, count in listed if _spaced(tag) not in known]
    return found[:limit]


def _best(tags: list[tuple[str, int]], wanted: str) -> list[tuple[str, int]]:
    return sorted(tags, key=lambda found: not _spaced(found[0]).startswith(wanted))


def _listed(user: User, wanted: str) -> list[tuple[str, int]]:
    text = TagList.objects.filter(owner=user).values_list("tags", flat=True).first() or ""
    lines = (line.rpartition(",") for line in text.split("\n") if wanted in line.casefold())
    return [(tag, int(count)) for tag, _, count in lines if wanted in tag.casefold()]


def _spaced(tag: str) -> str:
    return " ".join(tag.replace("_", " ").split()).casefold()


# --- A person's own list ----------------------------------------------------------------------------------------------
def set_tag_list(owner: User, *, name: str, content: bytes) -> TagList:
    """Keep a list of tags, in place of the one before: lines `tag`, `tag,count`, or `tag,category,count,aliases` as
    boorus export them. Underscores become spaces. Raises UserError for anything else."""
    tags = sorted(_read_tags(content).items(), key=lambda found: -found[1])
    lines = "\n".join(f"{tag},{count}" for tag, count in tags)
    with transaction.atomic():
        return TagList.objects.update_or_create(
            owner=owner, defaults={"name": name[-255:], "tags": lines, "tag_count": len(tags)}
        )[0]


def delete_tag_list(owner: User) -> None:
    TagList.objects.filter(owner=owner).delete()


def tag_list_of(user: User) -> TagList | None:
    return TagList.objects.filter(owner=user).defer("tags").first()


def _read_tags(content: bytes) -> dict[str, int]:
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"A tag list has at most {MAX_FILE_BYTES // 1024**2} MiB.", field="file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("The tag list is not UTF-8 text.", field="file") from None
    tags: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        tag, count = _read_line(line)
        if len(tag) > LONGEST_TAG or not tag.isprintable():
            raise UserError(f"Line {number} is no tag. Each line is `tag` or `tag,count`.", field="file")
        if tag:
            tags[tag] = max(count, tags.get(tag, 0))
        if len(tags) > MAX_TAGS:
            raise UserError(f"A tag list has at most {MAX_TAGS:,} tags.", field="file")
    if not tags:
        raise UserError("The file has no tags. Each line is `tag` or `tag,count`.", field="file")
    return tags


def _read_line(line: str) -> tuple[str, int]:
    parts = line.split(",")
    numbers = [part.strip() for part in parts[1:3] if part.strip().isascii() and part.strip().isdigit()]
    count = int(numbers[-1][:12]) if numbers else 0
    tag = parts[0].strip().strip('"')
    return (tag if len(tag) <= 3 else " ".join(tag.replace("_", " ").split())), count
