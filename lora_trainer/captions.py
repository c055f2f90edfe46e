"""What becomes of a caption at each use: prefix and suffix, dropout, shuffled and dropped tags. Torch-free.

Order and details are those of sd-scripts' process_caption, so that the same options give the same distribution of
texts: without shuffling and tag dropout a caption is left as it is, its marks for kept tags included.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self

from lora_trainer.config import TrainingConfig


class Draws(Protocol):
    """Where random choices come from."""

    def uniform(self) -> float:
        """From 0 to below 1."""

    def permutation(self, count: int) -> list[int]:
        """0 to count - 1 in a random order."""


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """The caption options of a run."""

    prefix: str = ""
    suffix: str = ""
    separator: str = ","
    shuffle: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    dropout_rate: float = 0.0
    dropout_every_n_epochs: int = 0
    tag_dropout_rate: float = 0.0

    @classmethod
    def from_config(cls, config: TrainingConfig) -> Self:
        """The options under the names that they have here."""
        return cls(
            prefix=config.caption_prefix,
            suffix=config.caption_suffix,
            separator=config.caption_separator,
            shuffle=config.shuffle_caption,
            keep_tokens=config.keep_tokens,
            keep_tokens_separator=config.keep_tokens_separator,
            dropout_rate=config.caption_dropout_rate,
            dropout_every_n_epochs=config.caption_dropout_every_n_epochs,
            tag_dropout_rate=config.caption_tag_dropout_rate,
        )

    def caption_for(self, caption: str, epoch: int, draws: Draws) -> str:
        """The text of one use. Epochs count from 0; draws are made only for what is switched on."""
        is_dropped = self.dropout_rate > 0 and draws.uniform() < self.dropout_rate
        if is_dropped or self._drops_epoch(epoch):
            return ""
        whole = self._framed(caption)
        if not self._changes_tags:
            return whole
        first, free, last = self._tags(whole)
        if self.shuffle:
            free = [free[place] for place in draws.permutation(len(free))]
        if self.tag_dropout_rate > 0:
            free = [tag for tag in free if draws.uniform() >= self.tag_dropout_rate]
        return _joined(first, free, last)

    def plain(self, caption: str) -> str:
        """The text with all its tags in their own order: what is trained on average, for counting and validation."""
        whole = self._framed(caption)
        return _joined(*self._tags(whole)) if self._changes_tags else whole

    def possible_captions(self, captions: Iterable[str]) -> list[str] | None:
        """Every text that uses of these can have, to be encoded beforehand; None when there are too many to list."""
        if self._changes_tags:
            return None
        texts = {self._framed(caption) for caption in captions}
        return sorted(texts | {""} if self.dropout_rate or self.dropout_every_n_epochs else texts)

    @property
    def _changes_tags(self) -> bool:
        return self.shuffle or self.tag_dropout_rate > 0

    def _drops_epoch(self, epoch: int) -> bool:
        # sd-scripts counts epochs from 1 here: every 2 means the second, the fourth, …
        return self.dropout_every_n_epochs > 0 and (epoch + 1) % self.dropout_every_n_epochs == 0

    def _framed(self, caption: str) -> str:
        """With prefix and suffix, which are thus shuffled with the rest unless tokens are kept."""
        whole = f"{self.prefix} {caption}" if self.prefix else caption
        return f"{whole} {self.suffix}" if self.suffix else whole

    def _tags(self, caption: str) -> tuple[list[str], list[str], list[str]]:
        """Tags that stay in front, those that are shuffled and dropped, and those that stay behind."""
        mark = self.keep_tokens_separator
        if not mark or mark not in caption:
            tags = [tag.strip() for tag in caption.strip().split(self.separator)]
            return tags[: self.keep_tokens], tags[self.keep_tokens :], []
        first, _, rest = caption.partition(mark)
        free, _, last = rest.partition(mark)
        return self._split(first), self._split(free), self._split(last)

    def _split(self, part: str) -> list[str]:
        return [tag.strip() for tag in part.split(self.separator) if tag.strip()]


def _joined(*parts: list[str]) -> str:
    # always a comma and a space, whatever the separator was
    return ", ".join(tag for part in parts for tag in part)
