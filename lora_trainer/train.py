"""One training run, top to bottom: set up the machine, load the model, encode the dataset, loop, save."""

import dataclasses
import gc
import math
import os
import resource
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from PIL import Image

from lora_trainer import adapter, adapting
from lora_trainer.adapter import LoraPair
from lora_trainer.architectures import load_base_model
from lora_trainer.architectures.base import UNET, BaseModel, LoadOptions
from lora_trainer.attention import choose_attention
from lora_trainer.cache import DiskCache
from lora_trainer.captions import CaptionRules
from lora_trainer.compiling import Compiler
from lora_trainer.config import TrainingConfig
from lora_trainer.console import Console, clock, steps_line
from lora_trainer.data import BatchOrder, Dataset, Picture
from lora_trainer.encoding import Latents, Texts
from lora_trainer.errors import FINISHED, STOPPED, NonFiniteLossError, StopRequested, is_out_of_memory
from lora_trainer.events import EventLog
from lora_trainer.export import DTYPES, read_kohya
from lora_trainer.loop import Loop, StepResult
from lora_trainer.memory import fits_without_checkpointing
from lora_trainer.noise import NoiseProcess
from lora_trainer.outputs import Outputs
from lora_trainer.plan import make_plan
from lora_trainer.prompts import SamplePrompt
from lora_trainer.sampling import draw_sample
from lora_trainer.state import load_state, recipe_digest
from lora_trainer.stop import StopSignal
from lora_trainer.validation import Validation

WAITING_FOR_OTHERS = timedelta(days=1)
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
    model: BaseModel
    loop: Loop
    outputs: Outputs
    validation: Validation | None
    compiler: Compiler | None
    recipe: str
    ends_early: bool = False


def train(
    config: TrainingConfig,
    dataset: Dataset,
    held_back: Dataset,
    *,
    accelerator: Accelerator,
    events: EventLog,
    console: Console,
    stop: StopSignal,
) -> int:
    """Train and save; returns the exit status of a finished or a stopped run, and raises for everything else."""
    stop.raise_if_requested()
    run = _set_up(config, dataset, held_back, accelerator, events=events, console=console, stop=stop)
    try:
        return _train_and_save(run)
    finally:
        run.outputs.close()


def make_accelerator(config: TrainingConfig, events: EventLog, console: Console) -> Accelerator:
    """The device, or this process's share of several. Mixed precision is for GPUs: a CPU is slower and less exact."""
    precision = config.mixed_precision
    if precision != "no" and not torch.cuda.is_available():
        message = f"mixed_precision = '{precision}' needs a GPU; training in float32 on the CPU."
        events.emit("warning", code="precision_fallback", message=message)
        console.line(f"Warning: {message}")
        precision = "no"
    # others wait while the first process encodes the pictures or draws samples. Whether it still lives, the launcher
    # knows.
    patience = InitProcessGroupKwargs(timeout=WAITING_FOR_OTHERS)
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])


def _set_up(
    config: TrainingConfig,
    dataset: Dataset,
    held_back: Dataset,
    accelerator: Accelerator,
    *,
    events: EventLog,
    console: Console,
    stop: StopSignal,
) -> Run:
    model = _load_model(config, accelerator, events, console)
    stop.raise_if_requested()
    pairs = _add_lora(model, config, console)
    cache = DiskCache(Path(config.cache_dir)) if config.cache_dir else None
    encode = _Encoder(config, model, cache, events=events, console=console, stop=stop)
    with accelerator.main_process_first():  # the others then find everything in the cache, if there is one
        latents, texts = encode.pictures(dataset.pictures), encode.captions(dataset.pictures)
    noise = NoiseProcess(model.scheduler_config, model.prediction, config)
    order = BatchOrder(
        dataset,
        config.train_batch_size,
        config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    plan = make_plan(config, order.batches_per_epoch)
    loop = Loop(
        config,
        plan,
        accelerator=accelerator,
        model=model,
        pairs=pairs,
        pictures=dataset.pictures,
        latents=latents,
        texts=texts,
        noise=noise,
        order=order,
    )
    validation = None
    if held_back.pictures:
        validation = Validation(
            config=config,
            accelerator=accelerator,
            model=model,
            pictures=held_back.pictures,
            latents=encode.pictures(held_back.pictures),
            condition=loop.condition,
            noise=noise,
        )
    recipe = recipe_digest(config, str(accelerator.device))
    resumed = _resume(config, loop, validation, recipe, accelerator, events=events, console=console)
    is_checkpointing = _choose_checkpointing(config, model, loop, accelerator, console)
    outputs = Outputs(
        dataclasses.replace(config, gradient_checkpointing=is_checkpointing),
        dataset=dataset,
        validation_images=len(held_back.pictures),
        processes=accelerator.num_processes,
        is_first=accelerator.is_main_process,
        model=model,
        loop=loop,
        pairs=pairs,
        events=events,
        console=console,
    )
    trained = sum(tensor.numel() for tensor in adapter.parameters(pairs))
    device, precision = _device_name(accelerator), _precision(accelerator)
    events.emit(
        "started",
        total_steps=loop.plan.total_steps,
        start_step=loop.step,
        resume=resumed,
        images=len(dataset.pictures),
        validation_images=len(held_back.pictures),
        batches_per_epoch=order.batches_per_epoch,
        device=device,
        processes=accelerator.num_processes,
        precision=precision,
        batch_size=config.train_batch_size,
        parameters=trained,
    )
    console.line(f"Training {trained:,} parameters on {device}, precision {precision}")
    compiler = Compiler(model.unet, loop.plan.total_steps, console) if config.torch_compile else None
    return Run(config, events, console, stop, accelerator, model, loop, outputs, validation, compiler, recipe)


def _load_model(config: TrainingConfig, accelerator: Accelerator, events: EventLog, console: Console) -> BaseModel:
    events.emit("stage", stage="loading model", done=0, total=1)
    console.line(f"Loading {config.pretrained_model_name_or_path} …")
    model = load_base_model(
        LoadOptions(
            path=Path(config.pretrained_model_name_or_path),
            vae=Path(config.vae) if config.vae else None,
            device=accelerator.device,
            dtype=DTYPES[_precision(accelerator)],
            max_token_length=config.max_token_length,
            clip_skip=config.clip_skip,
            v_parameterization=config.v_parameterization,
        )
    )
    if config.zero_terminal_snr:
        model.scheduler_config = {**model.scheduler_config, "rescale_betas_zero_snr": True}
    _choose_threads(config, model.unet)
    console.line(choose_attention(model.unet, config.attention, accelerator.device))
    events.emit("stage", stage="loading model", done=1, total=1)
    return model


def _choose_threads(config: TrainingConfig, unet: torch.nn.Module) -> None:
    """One thread for a tiny model: on two cores pilot-tiny does 4.7 steps a second with one thread and 2.9 with two."""
    if config.threads:
        torch.set_num_threads(config.threads)
    elif sum(tensor.numel() for tensor in unet.parameters()) < TINY_UNET_PARAMETERS:
        torch.set_num_threads(1)


def _add_lora(model: BaseModel, config: TrainingConfig, console: Console) -> list[LoraPair]:
    if not config.network_weights:
        return adapter.add_lora(model, config)
    saved = read_kohya(Path(config.network_weights))
    pairs = adapter.add_lora(model, config, start_from=saved.sizes if config.dim_from_weights else None)
    taken = saved.load_into(pairs)
    console.line(f"Starting from {config.network_weights}: {taken} of {len(pairs)} modules")
    return pairs


def _precision(accelerator: Accelerator) -> str:
    precision: str = accelerator.mixed_precision
    return "float" if precision == "no" else precision


def _device_name(accelerator: Accelerator) -> str:
    device = accelerator.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    return f"{accelerator.num_processes} x {name}" if accelerator.num_processes > 1 else name


def _resume(
    config: TrainingConfig,
    loop: Loop,
    validation: Validation | None,
    recipe: str,
    accelerator: Accelerator,
    *,
    events: EventLog,
    console: Console,
) -> str | None:
    """Take up a saved state. `exact`: what follows is, bit for bit, what would have followed without the stop."""
    if not config.resume:
        return None
    state = load_state(Path(config.resume))
    differences = loop.restore(state)
    # a loss at another resolution is no measure for the best one so far
    is_comparable = state.setup is None or state.setup.resolution == config.resolution
    if validation and state.validation and is_comparable:
        validation.verdict.restore(state.validation)
    is_exact = state.recipe == recipe and accelerator.device.type == "cpu" and not config.torch_compile
    how = "exact" if is_exact else "close"
    console.line(f"Resuming after step {loop.step} from {config.resume} ({how})")
    if differences:
        message = adapting.sentence(loop.step, differences)
        events.emit("warning", code="resume_adapted", message=message)
        console.line(f"Warning: {message}")
    return how


def _choose_checkpointing(
    config: TrainingConfig, model: BaseModel, loop: Loop, accelerator: Accelerator, console: Console
) -> bool:
    """Switch it on where it is wanted or needed; returns whether it is on."""
    wanted = config.gradient_checkpointing
    if wanted is None:
        wanted = not fits_without_checkpointing(loop, accelerator.device)
        if wanted:
            console.line("Gradient checkpointing is on: without it a step does not fit into the GPU's memory.")
    if wanted:
        model.unet.enable_gradient_checkpointing()
        for encoder in model.text_encoders:
            encoder.gradient_checkpointing_enable()  # type: ignore[operator]  # of transformers' models
    return wanted


class _Encoder:
    """Pictures and captions of a run, encoded once as far as the options allow."""

    def __init__(
        self,
        config: TrainingConfig,
        model: BaseModel,
        cache: DiskCache | None,
        *,
        events: EventLog,
        console: Console,
        stop: StopSignal,
    ) -> None:
        self._config = config
        self._model = model
        self._cache = cache
        self._events = events
        self._console = console
        self._stop = stop

    def pictures(self, pictures: list[Picture]) -> Latents:
        latents = Latents(self._model, pictures, keep=self._config.keeps_latents, cache=self._cache)
        if self._config.keeps_latents:
            latents.fill(with_flips=self._config.flip_aug, report=self._stage("caching latents"))
            self._console.line(latents.summary())
            self._warn_of_cache()
        else:
            latents.check(self._stage("checking pictures"))
        return latents

    def captions(self, pictures: list[Picture]) -> Texts:
        config, model = self._config, self._model
        rules = CaptionRules.from_config(config)
        captions = [picture.caption for picture in pictures]
        self._warn_of_long([rules.plain(caption) for caption in captions])
        possible = rules.possible_captions(captions)
        encoded = Texts(model, keep=possible is not None, cache=self._cache)
        if possible is not None and adapter.rates(model, config).keys() <= {UNET}:
            encoded.fill(possible, self._stage("caching text"))
            self._console.line(encoded.summary())
        return encoded

    def _warn_of_long(self, texts: list[str]) -> None:
        limit = self._config.max_token_length
        long = sum(self._model.token_count(text) > limit for text in set(texts))
        if long:
            more = f" max_token_length = {limit + 75} reads more." if limit < 225 else ""
            message = f"{long} captions are longer than {limit} tokens; the rest of them is ignored.{more}"
            self._events.emit("warning", code="caption_truncated", message=message)
            self._console.line(f"Warning: {message}")

    def _warn_of_cache(self) -> None:
        if self._cache and self._cache.trouble:
            self._events.emit("warning", code="cache_not_written", message=self._cache.trouble)

    def _stage(self, name: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            self._stop.raise_if_requested()
            self._console.progress(f"{name}: {done}/{total}", force=done == total)
            if done == total or done % 10 == 0:
                self._events.emit("stage", stage=name, done=done, total=total)
            if done == total:
                self._console.end_progress()

        return report


def _train_and_save(run: Run) -> int:
    loop, total = run.loop, run.loop.plan.total_steps
    if run.config.sample_at_first and loop.step == 0:
        _draw_samples(run)
    _set_training_mode(run)
    speed = _Speed(first_step=loop.step)
    bad_steps = 0
    while loop.step < total and not run.ends_early and not _is_stop_wanted(run):
        started = time.monotonic()
        result = loop.advance()
        seconds = time.monotonic() - started
        speed.add(seconds, result.images)
        if run.compiler:
            run.compiler.after_step(loop.step - speed.first_step, seconds)
        _report_step(run, result, speed)
        bad_steps = 0 if math.isfinite(result.loss) else bad_steps + 1
        if bad_steps > NON_FINITE_STEPS_ALLOWED:
            raise NonFiniteLossError(_nan_sentence(loop.step))
        if loop.step < total:
            _do_what_is_due(run)
    run.console.end_progress()
    return _finish(run, speed) if loop.step >= total or run.ends_early else _stop(run)


def _is_stop_wanted(run: Run) -> bool:
    """All processes leave after the same step, whichever got the signal."""
    if run.accelerator.num_processes == 1:
        return run.stop.requested
    flag = torch.tensor(float(run.stop.requested), device=run.accelerator.device)
    total: Any = run.accelerator.reduce(flag, reduction="sum")
    return bool(total > 0)


def _set_training_mode(run: Run) -> None:
    run.model.unet.train()
    trained = adapter.rates(run.model, run.config)
    for part, module in run.model.parts().items():
        if part != UNET:
            module.train(part in trained)


def _nan_sentence(step: int) -> str:
    first = step - NON_FINITE_STEPS_ALLOWED
    advice = "Lower learning_rate, or use mixed_precision = 'bf16' or 'no'."
    return f"The loss was not a finite number from step {first} to step {step}. {advice}"


def _do_what_is_due(run: Run) -> None:
    config, plan, step = run.config, run.loop.plan, run.loop.step
    by_epoch = plan.is_due(step, epochs=config.save_every_n_epochs)
    by_step = plan.is_due(step, steps=config.save_every_n_steps)
    if by_epoch and _is_first(run):
        run.outputs.checkpoint_of_epoch()
    if by_step and _is_first(run):
        run.outputs.checkpoint_of_step()
    _validate_if_due(run)
    if config.save_state and (by_epoch or by_step):
        _save_state(run)
    if plan.is_due(step, steps=config.sample_every_n_steps, epochs=config.sample_every_n_epochs):
        _draw_samples(run)


def _is_first(run: Run) -> bool:
    return bool(run.accelerator.is_main_process)


def _save_state(run: Run) -> Path | None:
    verdict = run.validation.verdict.as_state() if run.validation else {}
    state = run.loop.state(verdict, run.recipe)
    return run.outputs.state(state) if _is_first(run) else None


def _validate_if_due(run: Run, *, is_last: bool = False) -> None:
    config, plan, step = run.config, run.loop.plan, run.loop.step
    every_epoch = config.validate_every_n_epochs or (0 if config.validate_every_n_steps else 1)
    due = plan.is_due(step, steps=config.validate_every_n_steps, epochs=every_epoch)
    if run.validation is None or not (due or is_last):
        return
    with run.loop.weights_to_keep():
        loss = run.validation.loss(lambda done, total: _tell_validation(run, done, total))
    verdict = run.validation.verdict
    is_best = verdict.add(loss, step)
    run.events.emit("validation", step=step, loss=loss, best_loss=verdict.best, best_step=verdict.best_step)
    run.outputs.curve("loss/validation", loss)
    run.console.line(f"Validation after step {step}: loss {loss:.5f}{' (the best so far)' if is_best else ''}")
    if is_best and config.save_best and _is_first(run):
        run.outputs.checkpoint(suffix="-best")
    patience = config.early_stopping_patience
    if patience and verdict.without_gain >= patience and not is_last:
        run.ends_early = True
        run.console.line(
            f"Stopping early: no better loss than that of step {verdict.best_step} for {patience} validations."
        )


def _tell_validation(run: Run, done: int, total: int) -> None:
    """Only as an event: on the console it would tear the progress line at every validation."""
    if done == total or done % 10 == 0:
        run.events.emit("stage", stage="validating", done=done, total=total)


def _draw_samples(run: Run) -> None:
    prompts = run.config.sample_prompts if _is_first(run) else ()
    with run.loop.weights_to_keep():
        for index, sample in enumerate(prompts):
            if run.stop.requested:
                break
            image = _drawn(run, index, sample)
            if image:
                run.outputs.sample(index, sample, image)
            run.console.progress(f"sampling: {index + 1}/{len(prompts)}", force=True)
            run.events.emit("stage", stage="sampling", done=index + 1, total=len(prompts))
    run.console.end_progress()
    run.accelerator.wait_for_everyone()


def _drawn(run: Run, index: int, sample: SamplePrompt) -> Image.Image | None:
    """None, with a warning, when memory does not suffice: a picture less is no reason to end a training."""
    try:
        return draw_sample(run.model, sample, run.accelerator, run.config.sample_sampler)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # not before here: the error's traceback has held on to the tensors
    gc.collect()
    torch.cuda.empty_cache()
    message = (
        f"Sample {index + 1} after step {run.loop.step} was left out: memory ran out while it was drawn. "
        f"Give it a smaller width and height than {sample.width}x{sample.height}."
    )
    run.events.emit("warning", code="sample_memory", message=message)
    run.console.line(f"Warning: {message}")
    return None


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
    step, total = run.loop.step, run.loop.plan.total_steps
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
    _validate_if_due(run, is_last=True)
    written = run.outputs.checkpoint(final=True) if _is_first(run) else None
    if run.config.save_state:
        _save_state(run)
    _draw_samples(run)
    if written is None:
        return FINISHED
    path = run.outputs.relative(written.path)
    run.events.emit("finished", step=run.loop.step, checkpoint=path, sha256=written.sha256, early=run.ends_early)
    steps = run.loop.step - speed.first_step
    run.console.line(f"Finished: {steps} steps in {clock(speed.training_seconds)}, saved {written.path}")
    return FINISHED


def _stop(run: Run) -> int:
    """Leave as somebody asked, with everything saved that resuming needs."""
    if run.loop.step == 0:
        raise StopRequested
    written = run.outputs.checkpoint_of_step() if _is_first(run) else None
    state = _save_state(run)
    if written and state:
        run.events.emit(
            "stopped",
            step=run.loop.step,
            checkpoint=run.outputs.relative(written.path),
            state=run.outputs.relative(state),
        )
        run.console.line(f"Stopped after step {run.loop.step}; resume from {state}")
    # a launcher that sees one process end signals the others, which would not finish writing
    run.accelerator.wait_for_everyone()
    return STOPPED
