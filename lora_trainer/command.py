"""The command line: read the configuration, train, and turn whatever happens into an exit status and one sentence."""

import argparse
import contextlib
import sys
import traceback
from pathlib import Path

from lora_trainer import config as configuration
from lora_trainer.config import TrainingConfig
from lora_trainer.console import Console
from lora_trainer.data import Dataset, read_dataset
from lora_trainer.errors import FINISHED, STOPPED, StopRequested, TrainerError, explain
from lora_trainer.events import EventLog
from lora_trainer.model_folder import check_model_folder
from lora_trainer.stop import StopSignal

INTERNAL_SENTENCE = "The trainer failed because of a fault of its own; the traceback is above. Please report it."


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status (see docs/trainer.md)."""
    options = _parser().parse_args(arguments)
    console = Console()
    events: EventLog | None = None
    try:
        table = configuration.read_table(options.config)
        if not (options.dry_run or options.print_config):
            path = configuration.events_path_of(table)
            events = EventLog(path) if path else None
        config = configuration.from_table(table)
        if options.print_config:
            console.line(configuration.to_toml(config))
            return FINISHED
        if options.dry_run or events is None:
            return _dry_run(config, console)
        return _train(config, events, console)
    except BaseException as error:  # noqa: BLE001 - the process ends here, whatever it was
        return _fail(error, events, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_trainer", description="Train a LoRA from a TOML file.")
    parser.add_argument("config", type=Path, help="the TOML file; its keys are listed in docs/trainer.md")
    parser.add_argument("--dry-run", action="store_true", help="check everything but the weights, and train nothing")
    parser.add_argument("--print-config", action="store_true", help="print the complete configuration as TOML")
    return parser


def _train(config: TrainingConfig, events: EventLog, console: Console) -> int:
    stop = StopSignal()
    stop.install()
    check_model_folder(Path(config.pretrained_model_name_or_path))
    dataset = read_dataset(config)
    _report_dataset(dataset, console)
    for notice in dataset.notices:
        events.emit("warning", code=notice.code, message=notice.message)
    # seconds of imports, so only after the cheap checks
    events.emit("stage", stage="loading program", done=0, total=1)
    console.line("Loading PyTorch …")
    from lora_trainer.train import train

    try:
        return train(config, dataset, events=events, console=console, stop=stop)
    except StopRequested:
        events.emit("stopped", step=0, checkpoint=None, state=None)
        console.line("Stopped before the first step; nothing was saved.")
        return STOPPED


def _dry_run(config: TrainingConfig, console: Console) -> int:
    check_model_folder(Path(config.pretrained_model_name_or_path))
    dataset = read_dataset(config)
    _report_dataset(dataset, console)
    # a batch holds pictures of one bucket only, so each bucket rounds up by itself
    batches = sum(-(-count // config.train_batch_size) for count in dataset.bucket_counts().values())
    epochs = config.max_train_steps * config.gradient_accumulation_steps / batches
    console.line(f"Base model: {config.pretrained_model_name_or_path}")
    console.line(f"Steps: {config.max_train_steps}, {batches} batches an epoch, {epochs:.1f} epochs")
    return FINISHED


def _report_dataset(dataset: Dataset, console: Console) -> None:
    console.line(f"Pictures: {len(dataset.pictures)} ({dataset.images_per_epoch} an epoch with repeats)")
    for (width, height), count in sorted(dataset.bucket_counts().items()):
        console.line(f"  bucket {width}x{height}: {count}")
    console.line(f"Dropped pictures: {len(dataset.dropped)}")
    for notice in dataset.notices:
        console.line(f"Warning: {notice.message}")


def _fail(error: BaseException, events: EventLog | None, console: Console) -> int:
    """Say in one sentence why the run ends, as its last line and as an event; a traceback only for our own faults."""
    known = explain(error)
    if known is None:
        console.end_progress()
        traceback.print_exception(error, file=sys.stdout)
        known = TrainerError(INTERNAL_SENTENCE)
    if events is not None:
        with contextlib.suppress(OSError):  # the disk may be what is full
            events.emit("error", code=known.code, message=str(known))
    console.line(f"Error: {known}")
    return known.exit_status
