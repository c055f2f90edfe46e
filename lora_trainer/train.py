"""One training run, top to bottom: set up the machine, load the model, encode the dataset, loop, save."""

import math
import os
import resource
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lora_trainer import adapter
from lora_trainer.config import TrainingConfig
from lora_trainer.console import Console, clock, steps_line
from lora_trainer.data import BatchOrder, Dataset
from lora_trainer.encoding import Captions, Latents
from lora_trainer.errors import FINISHED, STOPPED, NonFiniteLossError
from lora_trainer.events import EventLog
from lora_trainer.export import DTYPES
from lora_trainer.loop import Loop, StepResult
from lora_trainer.models import load_base_model
from lora_trainer.noise import NoiseProcess
from lora_trainer.outputs import Outputs
from lora_trainer.sampling import draw_sample
from lora_trainer.state import load_state
from lora_trainer.stop import StopSignal

NON_FINITE_STEPS_ALLOWED = 2
SPEED_WINDOW_STEPS = 50
TINY_UNET_PARAMETERS = 20_000_000


@dataclass
class Run:
    """What the parts of a run share."""

    config: TrainingConfig
    events: EventLog
    console: Console
    stop: StopSignal
    accelerator: Accelerator
    pipeline: Any
    loop: Loop
    outputs: Outputs


def train(config: TrainingConfig, dataset: Dataset, *, events: EventLog, console: Console, stop: StopSignal) -> int:
    """Train and save; returns the exit status of a finished or a stopped run, and raises for everything else."""
    stop.raise_if_requested()
    accelerator = Accelerator(mixed_precision=_usable_precision(config, events, console))
    run = _set_up(config, dataset, accelerator, events=events, console=console, stop=stop)
    try:
        return _train_and_save(run)
    finally:
        run.outputs.close()


def _choose_threads(config: TrainingConfig, unet: torch.nn.Module) -> None:
    """One thread for a tiny model: on two cores pilot-tiny does 4.7 steps a second with one thread and 2.9 with two."""
    if config.threads:
        torch.set_num_threads(config.threads)
    elif sum(tensor.numel() for tensor in unet.parameters()) < TINY_UNET_PARAMETERS:
        torch.set_num_threads(1)


def _usable_precision(config: TrainingConfig, events: EventLog, console: Console) -> str:
    """Mixed precision is for GPUs: on a CPU it is slower than float32 and less exact."""
    if config.mixed_precision == "no" or torch.cuda.is_available():
        return config.mixed_precision
    message = f"mixed_precision = '{config.mixed_precision}' needs a GPU; training in float32 on the CPU."
    events.emit("warning", code="precision_fallback", message=message)
    console.line(f"Warning: {message}")
    return "no"


def _set_up(
    config: TrainingConfig,
    dataset: Dataset,
    accelerator: Accelerator,
    *,
    events: EventLog,
    console: Console,
    stop: StopSignal,
) -> Run:
    events.emit("stage", stage="loading model", done=0, total=1)
    console.line(f"Loading {config.pretrained_model_name_or_path} …")
    weights = {"no": "float"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    model_folder = Path(config.pretrained_model_name_or_path)
    pipeline = load_base_model(model_folder, device=accelerator.device, unet_dtype=DTYPES[weights])
    events.emit("stage", stage="loading model", done=1, total=1)
    stop.raise_if_requested()

    _choose_threads(config, pipeline.unet)
    pairs = adapter.add_lora(pipeline.unet, config)
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    latents, captions = _encode(config, dataset, pipeline, accelerator, events=events, console=console, stop=stop)
    noise = NoiseProcess(pipeline.scheduler.config, config)
    order = BatchOrder(dataset, config.train_batch_size, config.seed)
    loop = Loop(
        config,
        accelerator=accelerator,
        unet=pipeline.unet,
        pairs=pairs,
        pictures=dataset.pictures,
        latents=latents,
        captions=captions,
        noise=noise,
        order=order,
    )
    if config.resume:
        loop.restore(load_state(Path(config.resume)))
        console.line(f"Resuming after step {loop.step} from {config.resume}")
    outputs = Outputs(
        config,
        dataset=dataset,
        loop=loop,
        pairs=pairs,
        unet_config=pipeline.unet.config,
        prediction=noise.prediction,
        batches_per_epoch=order.batches_per_epoch,
        events=events,
        console=console,
    )
    trained = sum(tensor.numel() for tensor in adapter.parameters(pairs))
    events.emit(
        "started",
        total_steps=config.max_train_steps,
        start_step=loop.step,
        images=len(dataset.pictures),
        batches_per_epoch=order.batches_per_epoch,
        device=_device_name(accelerator.device),
        precision=weights,
        batch_size=config.train_batch_size,
        parameters=trained,
    )
    console.line(f"Training {trained:,} parameters on {_device_name(accelerator.device)}, precision {weights}")
    return Run(config, events, console, stop, accelerator, pipeline, loop, outputs)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def _encode(
    config: TrainingConfig,
    dataset: Dataset,
    pipeline: Any,
    accelerator: Accelerator,
    *,
    events: EventLog,
    console: Console,
    stop: StopSignal,
) -> tuple[Latents, Captions]:
    """Encode pictures and captions once, as far as the options allow."""

    def stage(name: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            stop.raise_if_requested()
            console.progress(f"{name}: {done}/{total}", force=done == total)
            if done == total or done % 10 == 0:
                events.emit("stage", stage=name, done=done, total=total)
            if done == total:
                console.end_progress()

        return report

    latents = Latents(pipeline.vae, dataset.pictures, keep=config.cache_latents)
    if config.cache_latents:
        latents.fill(with_flips=config.flip_aug, report=stage("caching latents"))
    # shuffled captions are new at every use, so there is nothing to keep
    captions = Captions(pipeline, accelerator.device, keep=not config.shuffle_caption)
    texts = [picture.caption for picture in dataset.pictures]
    if not config.shuffle_caption:
        captions.fill([*texts, ""] if config.caption_dropout_rate else texts, stage("caching text"))
    long = captions.too_long(texts)
    if long:
        message = f"{len(long)} captions are longer than the model's 77 tokens; the rest of them is ignored."
        events.emit("warning", code="caption_truncated", message=message)
        console.line(f"Warning: {message}")
    return latents, captions


def _train_and_save(run: Run) -> int:
    config, loop = run.config, run.loop
    if config.sample_at_first and loop.step == 0:
        _draw_samples(run)
    run.pipeline.unet.train()
    speed = _Speed(first_step=loop.step)
    bad_steps = 0
    while loop.step < config.max_train_steps and not run.stop.requested:
        started = time.monotonic()
        result = loop.advance()
        speed.add(time.monotonic() - started, result.images)
        _report_step(run, result, speed)
        bad_steps = 0 if math.isfinite(result.loss) else bad_steps + 1
        if bad_steps > NON_FINITE_STEPS_ALLOWED:
            raise NonFiniteLossError(_nan_sentence(loop.step))
        if loop.step < config.max_train_steps and not run.stop.requested:
            _save_and_sample_on_the_way(run)
    run.console.end_progress()
    return _finish(run, speed) if loop.step >= config.max_train_steps else _stop(run)


def _nan_sentence(step: int) -> str:
    first = step - NON_FINITE_STEPS_ALLOWED
    advice = "Lower learning_rate, or use mixed_precision = 'bf16' or 'no'."
    return f"The loss was not a finite number from step {first} to step {step}. {advice}"


def _save_and_sample_on_the_way(run: Run) -> None:
    if _is_due(run.loop.step, run.config.save_every_n_steps):
        run.outputs.checkpoint(final=False)
        if run.config.save_state:
            run.outputs.state()
    if _is_due(run.loop.step, run.config.sample_every_n_steps):
        _draw_samples(run)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _draw_samples(run: Run) -> None:
    prompts = run.config.sample_prompts
    for index, sample in enumerate(prompts):
        if run.stop.requested:
            return
        run.outputs.sample(index, sample, draw_sample(run.pipeline, sample, run.accelerator))
        run.console.progress(f"sampling: {index + 1}/{len(prompts)}", force=True)
        run.events.emit("stage", stage="sampling", done=index + 1, total=len(prompts))
    run.console.end_progress()


class _Speed:
    """Steps and pictures a second over the last steps, without the time for saving and sampling."""

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        self.training_seconds = 0.0
        self._window: deque[tuple[float, int]] = deque(maxlen=SPEED_WINDOW_STEPS)

    def add(self, seconds: float, images: int) -> None:
        self.training_seconds += seconds
        self._window.append((seconds, images))

    @property
    def steps_per_second(self) -> float:
        return len(self._window) / max(1e-9, sum(seconds for seconds, _ in self._window))

    @property
    def images_per_second(self) -> float:
        return sum(images for _, images in self._window) / max(1e-9, sum(seconds for seconds, _ in self._window))


def _report_step(run: Run, result: StepResult, speed: _Speed) -> None:
    step, total = run.loop.step, run.config.max_train_steps
    eta = (total - step) / speed.steps_per_second
    run.events.emit(
        "progress",
        step=step,
        total_steps=total,
        epoch=result.epoch,
        loss=result.loss,
        lr=result.learning_rate,
        grad_norm=result.grad_norm,
        steps_per_second=round(speed.steps_per_second, 4),
        images_per_second=round(speed.images_per_second, 4),
        eta_seconds=round(eta, 1),
        memory_bytes=_memory_bytes(run.accelerator.device),
    )
    run.outputs.curves(result)
    line = steps_line(
        step=step,
        total=total,
        elapsed=speed.training_seconds,
        eta=eta,
        rate=speed.steps_per_second,
        loss=result.loss,
        lr=result.learning_rate,
    )
    run.console.progress(line, force=step == total)


def _memory_bytes(device: torch.device) -> int:
    """The most memory held so far: the GPU's on a GPU, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def _finish(run: Run, speed: _Speed) -> int:
    written = run.outputs.checkpoint(final=True)
    if run.config.save_state:
        run.outputs.state()
    _draw_samples(run)
    path = run.outputs.relative(written.path)
    run.events.emit("finished", step=run.loop.step, checkpoint=path, sha256=written.sha256)
    steps = run.loop.step - speed.first_step
    run.console.line(f"Finished: {steps} steps in {clock(speed.training_seconds)}, saved {written.path}")
    return FINISHED


def _stop(run: Run) -> int:
    """Leave as somebody asked, with everything saved that resuming needs."""
    if run.loop.step == 0:
        run.stop.raise_if_requested()
    written = run.outputs.checkpoint(final=False)
    state = run.outputs.state()
    run.events.emit(
        "stopped",
        step=run.loop.step,
        checkpoint=run.outputs.relative(written.path),
        state=run.outputs.relative(state),
    )
    run.console.line(f"Stopped after step {run.loop.step}; resume from {state}")
    return STOPPED
