"""`caption order.json`: caption one picture after the other, and tell each as soon as it is there.

Events (`lora_trainer.events`): `started` (start_step, total_steps), `captioned` (image, caption), `refused` (image,
reason), `progress` (step, total_steps, steps_per_second, eta_seconds), then `finished` (step, captioned), `stopped` or
`error`. A step is a picture.
"""

import time
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageOps

from lora_trainer.captioning.order import Order, read_order
from lora_trainer.console import Console
from lora_trainer.errors import FINISHED, STOPPED, ConfigError
from lora_trainer.events import EventLog
from lora_trainer.failing import fail
from lora_trainer.stop import StopSignal

TELL_SECONDS = 0.5
INTERNAL_SENTENCE = "The captioner failed because of a fault of its own; the traceback is above. Please report it."


class Captioner(Protocol):
    def caption(self, image: Image.Image) -> str: ...


def main(arguments: list[str]) -> int:
    """Returns the exit status, as the trainer's: docs/trainer.md."""
    console = Console()
    events: EventLog | None = None
    try:
        order = read_order(Path(*arguments))
        events = EventLog(Path(order.events_file))
        return _work(order, events, console)
    except BaseException as error:  # noqa: BLE001 - the process ends here, whatever it was
        return fail(error, events, console, INTERNAL_SENTENCE)


def _work(order: Order, events: EventLog, console: Console) -> int:
    stop = StopSignal()
    stop.install()
    events.emit("stage", stage="loading model", done=0, total=1)
    console.line(f"Loading {Path(order.model).name} …")
    captioner = _load(order)
    events.emit("started", start_step=order.start_step, total_steps=order.total)
    pace = _Pace(order, events, console)
    captioned = 0
    for path in order.pictures:
        if stop.requested:
            events.emit("stopped", step=pace.step)
            console.line(f"Stopped after {pace.step} of {order.total} pictures.")
            return STOPPED
        captioned += _tell(captioner, Path(path), events, console)
        pace.advance()
    events.emit("finished", step=order.total, captioned=captioned)
    console.line(f"Captioned {captioned} of {len(order.pictures)} pictures.")
    return FINISHED


def _load(order: Order) -> Captioner:
    if order.captioner == "tagger":
        from lora_trainer.captioning.tagger import Tagger

        return Tagger(order)
    if order.captioner == "sentences":
        from lora_trainer.captioning.sentences import Writer

        return Writer(order)
    raise ConfigError(f"There is no captioner {order.captioner!r}.")


def _tell(captioner: Captioner, path: Path, events: EventLog, console: Console) -> bool:
    """Caption one picture. One that cannot be read, or for which nothing is found, is told with the reason."""
    try:
        image = _opened(path)
    except Exception as error:  # noqa: BLE001 - a decoder that is fed with damaged bytes raises anything
        events.emit("refused", image=path.stem, reason=f"The picture cannot be read: {type(error).__name__}.")
        return False
    caption = captioner.caption(image)
    console.line(f"{path.stem[:12]}: {caption}")
    if not caption:
        events.emit("refused", image=path.stem, reason="Nothing was found in the picture. Lower the thresholds.")
        return False
    events.emit("captioned", image=path.stem, caption=caption)
    return True


def _opened(path: Path) -> Image.Image:
    """RGB, turned as EXIF says, on white where it is transparent."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if not image.has_transparency_data:
            return image.convert("RGB")
        layered = image.convert("RGBA")
        flat = Image.new("RGB", layered.size, "white")
        flat.paste(layered, mask=layered.getchannel("A"))
        return flat


class _Pace:
    """How far it is, told twice a second and at the end."""

    def __init__(self, order: Order, events: EventLog, console: Console) -> None:
        self.order = order
        self.events = events
        self.console = console
        self.step = order.start_step
        self.began = time.monotonic()
        self.told = 0.0

    def advance(self) -> None:
        self.step += 1
        now = time.monotonic()
        if now - self.told < TELL_SECONDS and self.step < self.order.total:
            return
        self.told = now
        done = self.step - self.order.start_step
        rate = done / max(now - self.began, 1e-6)
        left = (self.order.total - self.step) / rate
        figures = {"steps_per_second": rate, "eta_seconds": left}
        self.events.emit("progress", step=self.step, total_steps=self.order.total, **figures)
