"""What a captioner is told: a JSON file, read once, wrong keys refused."""

import dataclasses
import json
from pathlib import Path

from lora_trainer.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """`pictures`: absolute paths; a picture is named by its file's stem in events. Thresholds are probabilities."""

    captioner: str  # tagger, sentences
    model: str  # folder
    pictures: list[str]
    events_file: str
    device: str = "cpu"  # or cuda
    start_step: int = 0  # pictures that were captioned before
    general_threshold: float = 0.35
    character_threshold: float = 0.85
    underscores_to_spaces: bool = True
    exclude: list[str] = dataclasses.field(default_factory=list)
    prompt: str = ""
    max_tokens: int = 300

    @property
    def total(self) -> int:
        return self.start_step + len(self.pictures)


def read_order(path: Path) -> Order:
    """Raises ConfigError for what is no order."""
    try:
        return Order(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no order for captions: {error}.") from None
