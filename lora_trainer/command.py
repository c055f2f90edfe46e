"""The command line: read the configuration, train, and turn whatever happens into an exit status and one sentence."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

from lora_trainer import config as configuration
from lora_trainer import inspection
from lora_trainer.architectures import check_model
from lora_trainer.config import TrainingConfig
from lora_trainer.console import Console
from lora_trainer.data import BatchOrder, Dataset, read_dataset, split_validation
from lora_trainer.errors import (
    FINISHED,
    REFUSED,
    STOPPED,
    ConfigError,
    StopRequested,
    TrainerError,
    explain,
)
from lora_trainer.events import EventLog
from lora_trainer.failing import fail
from lora_trainer.plan import Plan, make_plan, make_schedule
from lora_trainer.stop import StopSignal

INTERNAL_SENTENCE = "The trainer failed because of a fault of its own; the traceback is above. Please report it."
FIRST_SPEAKS_SECONDS = 1.0
"""What ends all processes of a run at once is told by the first one: so long the others wait for it."""


def _caption(arguments: list[str]) -> int:
    from lora_trainer.captioning.command import main as caption

    return caption(arguments[1:])


OTHER_COMMANDS = {"inspect": inspection.run, "verify": inspection.run, "caption": _caption}


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status (see docs/trainer.md)."""
    if arguments[:1] and arguments[0] in OTHER_COMMANDS:
        return OTHER_COMMANDS[arguments[0]](arguments)
    if arguments == ["--options"]:
        Console().line("\n".join(configuration.option_rows()))
        return FINISHED
    options = _parser().parse_args(arguments)
    # of several processes (accelerate launch), the first one speaks
    is_first = int(os.environ.get("RANK", "0")) == 0
    console = Console() if is_first else Console(Path(os.devnull).open("w"))  # noqa: SIM115 - until the process ends
    events: EventLog | None = None
    try:
        table = configuration.read_table(options.config)
        if not (options.dry_run or options.print_config):
            path = configuration.events_path_of(table)
            events = EventLog(path, is_first=is_first) if path else None
        config = configuration.from_table(table)
        if options.print_config:
            console.line(configuration.to_toml(config))
            return FINISHED
        if options.dry_run or events is None:
            return _dry_run(config, console)
        return _train(config, events, console)
    except BaseException as error:  # noqa: BLE001 - the process ends here, whatever it was
        return fail(error, events, console, INTERNAL_SENTENCE) if is_first else _fail_beside_others(error, events)


def leave(status: int) -> NoReturn:
    """End the process. With a group that is still open, since a run of several processes failed, at once: while Python
    winds down, gloo's threads of the broken connections abort the process now and then."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_trainer",
        description="Train a LoRA from a TOML file.",
        epilog="`inspect FILE` says what a LoRA file holds; `verify FILE` which programs use all of it; "
        "`caption ORDER` captions pictures; `--options` prints a table of the TOML file's keys.",
    )
    parser.add_argument("config", type=Path, help="the TOML file; its keys are listed in docs/trainer.md")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, and train nothing")
    parser.add_argument("--print-config", action="store_true", help="print the complete configuration as TOML")
    return parser


def _train(config: TrainingConfig, events: EventLog, console: Console) -> int:
    stop = StopSignal()
    stop.install()
    _check_model(config)
    dataset, held_back = split_validation(read_dataset(config), config)
    _report_dataset(dataset, held_back, console)
    _plan(config, dataset)
    for notice in dataset.notices:
        events.emit("warning", code=notice.code, message=notice.message)
    # seconds of imports, so only after the cheap checks
    events.emit("stage", stage="loading program", done=0, total=1)
    console.line("Loading PyTorch …")
    from lora_trainer.train import make_accelerator, train

    accelerator = make_accelerator(config, events, console)
    try:
        status = train(config, dataset, held_back, accelerator=accelerator, events=events, console=console, stop=stop)
    except StopRequested:
        events.emit("stopped", step=0, checkpoint=None, state=None)
        console.line("Stopped before the first step; nothing was saved.")
        status = STOPPED
    # not after an error: other processes notice it by the broken connection, which must not come before the event
    accelerator.end_training()
    return status


def _dry_run(config: TrainingConfig, console: Console) -> int:
    _check_model(config)
    dataset, held_back = split_validation(read_dataset(config), config)
    _report_dataset(dataset, held_back, console)
    plan = _plan(config, dataset)
    console.line(f"Base model: {config.pretrained_model_name_or_path}")
    epochs = plan.total_steps / plan.steps_per_epoch
    console.line(f"Steps: {plan.total_steps}, {plan.steps_per_epoch} an epoch, {epochs:.1f} epochs")
    from lora_trainer.estimate import estimate

    for sentence in estimate(config, dataset, plan).sentences():
        console.line(sentence)
    return FINISHED


def _check_model(config: TrainingConfig) -> None:
    """Without reading a weight: is it a base model, and do the options fit it?"""
    path = Path(config.pretrained_model_name_or_path)
    architecture = check_model(path, vae=Path(config.vae) if config.vae else None)
    if config.clip_skip > 1 and architecture.key == "sdxl":
        raise ConfigError("'clip_skip' is for SD 1.5 and 2: SDXL always takes the layer before the last. Remove it.")


def _plan(config: TrainingConfig, dataset: Dataset) -> Plan:
    """Of one process. ConfigError when the schedule does not fit the steps."""
    plan = make_plan(config, BatchOrder(dataset, config.train_batch_size, config.seed).batches_per_epoch)
    make_schedule(config, plan.total_steps)
    return plan


def _report_dataset(dataset: Dataset, held_back: Dataset, console: Console) -> None:
    console.line(f"Pictures: {len(dataset.pictures)} ({dataset.images_per_epoch} an epoch with repeats)")
    regularisation = sum(picture.is_regularisation for picture in dataset.pictures)
    if regularisation:
        console.line(f"  regularisation pictures among them: {regularisation}")
    for (width, height), count in sorted(dataset.bucket_counts().items()):
        console.line(f"  bucket {width}x{height}: {count}")
    if held_back.pictures:
        console.line(f"Kept for validation: {len(held_back.pictures)}")
    console.line(f"Dropped pictures: {len(dataset.dropped)}")
    for notice in dataset.notices:
        console.line(f"Warning: {notice.message}")


def _fail_beside_others(error: BaseException, events: EventLog | None) -> int:
    """`fail` for all processes but the first: silent about what the first one tells as well."""
    time.sleep(FIRST_SPEAKS_SECONDS)
    known = explain(error)
    is_told = events is None or events.has_ended() or (known is not None and known.exit_status == REFUSED)
    if is_told:
        return (known or TrainerError).exit_status
    return fail(error, events, Console(), INTERNAL_SENTENCE)
