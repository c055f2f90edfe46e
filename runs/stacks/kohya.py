"""Kohya's sd-scripts: configured by TOML, followed by what it prints, proved by its last file.

Read from v0.10.1 (48d368fa): train_network.py and its sisters, library/train_util.py. Where the operator put it:
runs/stacks/installation.py. Its options: runs/stacks/options/kohya.toml.

It saves a state with each checkpoint and none when it is stopped. Its own ways to skip what was trained lose steps
(with gradient accumulation it may train nothing at all), so an attempt that goes on is told to train only what is left,
from step 0, with a learning-rate schedule whose length is that of the whole run. A true step is then `start_step` plus
what its bar shows: exact for every accumulation and resume. It begins a new shuffle, for which it gets another seed.

Each attempt writes to a folder of its own; finished checkpoints are taken from there under their true step.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toml

from lorapilot import workspace
from lorapilot.errors import UserError
from runs.enums import DeviceKind
from runs.spec import RunSpec, convert
from runs.stacks import option_table
from runs.stacks.base import (
    CheckpointSaved,
    Exit,
    Hopeless,
    Imported,
    LaunchPlan,
    ModelFacts,
    Noted,
    Observation,
    Outcome,
    Progress,
    Reading,
    SampleDrawn,
    Stage,
    Started,
    StateSaved,
    StopStep,
    TrainingJob,
    accelerate_launcher,
    steps_between_saves,
    trainer_environment,
    without_counterpart,
    without_parts,
    wrong_architecture,
)
from runs.stacks.clip_tokenizer import tokenizer_files
from runs.stacks.collecting import collect
from runs.stacks.console import failure, judge, log_pieces, pieces, progress_bar, steps_per_second
from runs.stacks.importing import read_toml, without_sections
from runs.stacks.installation import installation_error, program_of
from runs.stacks.sd_scripts_keys import SAME, keys_of, named, take
from runs.stacks.staging import staged_folders


@dataclass(frozen=True, slots=True)
class Family:
    """How sd-scripts trains models of one architecture. `parts`: the key of each further file, by its role."""

    script: str
    network: str
    parts: Mapping[str, str]
    optional: Mapping[str, str]  # as `parts`, where the main file may have it, too
    tokenizers: tuple[str, ...]
    fixed: Mapping[str, Any]  # the user's options win over it
    trains_text_encoders: bool = True
    caches_text_encoders: bool = True  # large ones do not stay in memory while it trains


CLIP_L = "openai_clip-vit-large-patch14"
CLIP_G = "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"
T5, GEMMA = "google_t5-v1_1-xxl", "google_gemma-2-2b"
QWEN, BYT5 = "Qwen_Qwen2.5-VL-7B-Instruct", "google_byt5-small"
# What brings those that we cannot make ourselves: entries of the models manifest.
TOKENIZER_ENTRIES = {
    T5: "tokenizer-t5-xxl",
    GEMMA: "tokenizer-gemma2",
    QWEN: "tokenizer-qwen25-vl",
    BYT5: "tokenizer-byt5-small",
}
FLOW = {"model_prediction_type": "raw"}
FAMILIES: dict[str, Family] = {
    "sd15": Family("train_network.py", "networks.lora", {}, {"vae": "vae"}, (CLIP_L,), {}, caches_text_encoders=False),
    "sd2": Family(
        "train_network.py", "networks.lora", {}, {"vae": "vae"}, ("stabilityai_stable-diffusion-2",), {"v2": True},
        caches_text_encoders=False,
    ),
    "sdxl": Family(
        "sdxl_train_network.py", "networks.lora", {}, {"vae": "vae"}, (CLIP_L, CLIP_G), {"no_half_vae": True},
        caches_text_encoders=False,
    ),
    "sd3": Family(
        "sd3_train_network.py", "networks.lora_sd3", {},
        {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl", "vae": "vae"}, (CLIP_L, CLIP_G, T5), {},
    ),
    "flux": Family(
        "flux_train_network.py", "networks.lora_flux", {"clip_l": "clip_l", "t5": "t5xxl", "vae": "ae"}, {},
        (CLIP_L, T5),
        FLOW | {"guidance_scale": 1.0, "timestep_sampling": "shift", "discrete_flow_shift": 3.1582},
    ),
    "chroma": Family(
        "flux_train_network.py", "networks.lora_flux", {"t5": "t5xxl", "vae": "ae"}, {}, (T5,),
        FLOW
        | {"model_type": "chroma", "guidance_scale": 0.0, "timestep_sampling": "sigmoid", "apply_t5_attn_mask": True},
        trains_text_encoders=False,
    ),
    "lumina2": Family(
        "lumina_train_network.py", "networks.lora_lumina", {"llm": "gemma2", "vae": "ae"}, {}, (GEMMA,),
        FLOW | {"timestep_sampling": "nextdit_shift", "discrete_flow_shift": 6.0},
        trains_text_encoders=False,
    ),
    "hunyuan_image": Family(
        "hunyuan_image_train_network.py", "networks.lora_hunyuan_image",
        {"llm": "text_encoder", "byt5": "byt5", "vae": "vae"}, {}, (QWEN, BYT5),
        FLOW | {"timestep_sampling": "sigma", "discrete_flow_shift": 5.0},
        trains_text_encoders=False,
    ),
    "anima": Family(
        "anima_train_network.py", "networks.lora_anima", {"llm": "qwen3", "vae": "vae"}, {}, (), {},
        trains_text_encoders=False,
    ),
}  # fmt: skip
# The role of the file that each key names, of all families.
PART_KEYS = {key: role for family in FAMILIES.values() for role, key in {**family.parts, **family.optional}.items()}
UNUSED = ("save_best", "ema_decay")
OFF_BY_ZERO = {"max_grad_norm"}  # left out, it would clip at 1
ONLY_SD = ("min_snr_gamma", "noise_offset")  # of the diffusion loss; flow matching has neither
DATASET = "dataset."  # before the names of options of the dataset's file
OWN_SCHEDULE = {"AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"}


class KohyaStack:
    key = "kohya"
    name = "Kohya sd-scripts"
    architectures = frozenset(FAMILIES)
    saves_on_stop = False
    reads_log = True

    def table(self) -> option_table.OptionTable:
        return option_table.load_table("kohya")

    def check(self) -> str:
        return installation_error("kohya")

    def refusal(self, model: ModelFacts) -> str:
        if wrong := wrong_architecture(self, model):
            return wrong
        family = FAMILIES[model.architecture]
        if model.layout == "folder" and model.architecture not in {"sd15", "sd2", "sdxl"}:
            return f"{self.name} reads {model.name} from a single file, not from a diffusers folder."
        if lacking := without_parts(self.name, model, family.parts):
            return lacking
        absent = [name for name in family.tokenizers if not _has_tokenizer(name)]
        if absent:
            entries = " and ".join(TOKENIZER_ENTRIES[name] for name in absent)
            return f"{self.name} needs more files for {model.name}: get {entries} under “Get models”."
        return ""

    def check_spec(self, spec: RunSpec, options: Mapping[str, Any]) -> None:
        """What sd-scripts would refuse after minutes, or silently do otherwise."""
        if options.get("cache_text_encoder_outputs") and spec.text_encoder_learning_rate:
            raise UserError(
                "Caching the text encoders' outputs leaves nothing of them to train: set the text-encoder rate to 0.",
                field="options.cache_text_encoder_outputs",
            )
        if options.get("cache_text_encoder_outputs") and (spec.shuffle_caption or spec.caption_dropout):
            raise UserError(
                "Captions that are shuffled or dropped differ each time: their encodings cannot be cached.",
                field="options.cache_text_encoder_outputs",
            )
        if options.get("cache_latents", True) and (options.get("random_crop") or options.get("color_aug")):
            raise UserError(
                "Random crops and colours differ each time: set cache_latents and cache_latents_to_disk to false.",
                field="options.random_crop" if options.get("random_crop") else "options.color_aug",
            )

    def not_expressed(self, spec: RunSpec, architecture: str) -> list[str]:
        family = FAMILIES.get(architecture, FAMILIES["sdxl"])
        fields = [*UNUSED, *(ONLY_SD if architecture not in {"sd15", "sd2", "sdxl"} else ())]
        if not family.trains_text_encoders:
            fields.append("text_encoder_learning_rate")
        lost = without_counterpart(self, fields, spec)
        if spec.optimizer in OWN_SCHEDULE and not spec.lr_schedule.startswith("constant"):
            lost.append(f"{spec.optimizer} has no use for the schedule {spec.lr_schedule}.")
        return lost

    def prepare(self, job: TrainingJob) -> None:
        """Each attempt writes to a folder of its own."""

    def compile(self, job: TrainingJob) -> LaunchPlan:
        folders, links, captions = staged_folders(job)
        config = job.attempt_folder / f"{job.name}.toml"
        dataset = job.attempt_folder / "dataset.toml"
        prompts = job.attempt_folder / "prompts.json"
        text = toml.dumps(_config(job, dataset, prompts))
        files = {
            config: text,
            job.folder / f"{job.name}.toml": text,
            dataset: toml.dumps({"datasets": [{"subsets": _subsets(folders, job.options)}]}),
            prompts: json.dumps(_prompts(job), ensure_ascii=False, indent=1),
            **tokenizer_files(_tokenizers()),
            **captions,
        }
        hub_files, hub_links = _hub(job)
        home, python = program_of("kohya")
        launcher = accelerate_launcher(len(job.device_uuids), "--num_cpu_threads_per_process", "1")
        argv = [str(python), *launcher, str(home / FAMILIES[job.architecture].script)]
        environment = trainer_environment(job, workspace.cache())
        return LaunchPlan(
            files=files | hub_files,
            links={**links, **hub_links},
            config=config,
            argv=[*argv, "--config_file", str(config)],
            env=environment
            | {"COLUMNS": "300", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_CACHE": str(_hub_cache(job))},
            cwd=home,
            # No signal makes it save: the first one is only the kinder end.
            stop=[StopStep("SIGINT", 10), StopStep("SIGTERM", 5), StopStep("SIGKILL", 5)],
            not_expressed=self.not_expressed(job.spec, job.architecture),
        )

    def report(self, reading: Reading) -> Path:
        return reading.log

    def parse(self, chunk: bytes, reading: Reading) -> tuple[list[Observation], int]:
        return _Console(reading).read(chunk)

    def measure(self, reading: Reading) -> list[Observation]:
        return []

    def states(self, folder: Path) -> list[tuple[Path, int]]:
        return _states(folder)

    def outcome(self, reading: Reading, exit_: Exit) -> Outcome:
        told = _told(reading)
        return judge(reading, exit_, failures=FAILURES, unfinished=_unfinished(reading, told), nan_step=told.nan_step)

    def read_config(self, text: str) -> Imported:
        """A configuration for sd-scripts that somebody brings along."""
        keys = _as_by_name(without_sections(read_toml(text)))
        taken = take(self.table(), keys)
        rate = taken.values.get("learning_rate")
        if "unet_lr" in keys and "learning_rate" in keys:  # the denoiser's wins, wherever it is
            taken.values["learning_rate"] = convert("learning_rate", keys["unet_lr"])
            rate = convert("learning_rate", keys["learning_rate"])
        trains_all = not keys.get("network_train_unet_only") and "text_encoder_lr" not in keys
        if trains_all and rate is not None:  # then it trains them at the same rate
            taken.values.setdefault("text_encoder_learning_rate", rate)
        return taken


# --- The configuration ------------------------------------------------------------------------------------------------
def _config(job: TrainingJob, dataset: Path, prompts: Path) -> dict[str, Any]:
    """The whole TOML: the family's own values, then those of the RunSpec, then the user's options, then ours."""
    family = FAMILIES[job.architecture]
    options = option_table.options_outside(job.options, DATASET)
    return (
        _of_spec(job, family)
        | dict(family.fixed)
        | _merged(job, options)
        | _schedule(job)
        | _ours(job, family, dataset, prompts)
    )


def _of_spec(job: TrainingJob, family: Family) -> dict[str, Any]:
    spec = job.spec
    keys = keys_of(spec) | {"cache_latents": True, "cache_latents_to_disk": True, "sdpa": True}
    keys["resolution"] = f"{spec.resolution},{spec.resolution}"  # it splits a text
    keys["bucket_reso_steps"] = 64  # it wants a multiple of 64 for SD 1.5 and 2, and of 32 for the others
    if job.architecture not in {"sd15", "sd2", "sdxl"}:
        keys = {key: value for key, value in keys.items() if SAME.get(key) not in ONLY_SD and key != "max_token_length"}
    if not family.trains_text_encoders:
        keys |= {"network_train_unet_only": True}
        keys.pop("text_encoder_lr", None)
    trains = bool(spec.text_encoder_learning_rate) and family.trains_text_encoders
    if family.caches_text_encoders and not (trains or spec.shuffle_caption or spec.caption_dropout):
        keys |= {"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True}
    if spec.caption_tokens == 75:
        keys.pop("max_token_length", None)
    if spec.optimizer == "Adafactor":  # else it takes a rate of its own
        keys["optimizer_args"] += ["relative_step=False", "scale_parameter=False", "warmup_init=False"]
    if job.device == DeviceKind.CPU:
        keys["mixed_precision"] = "no"
    if job.prediction_type == "v_prediction":
        keys["v_parameterization"] = True
    return {key: value for key, value in keys.items() if value != 0 or value is False or key in OFF_BY_ZERO}


def _merged(job: TrainingJob, options: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options. Lists of `name=value` come behind those that the RunSpec makes."""
    keys = keys_of(job.spec)
    merged = dict(options)
    for name in ("network_args", "optimizer_args"):
        if name in options:
            merged[name] = [*keys.get(name, []), *options[name]]
    if options.get("xformers") or options.get("mem_eff_attn"):
        merged["sdpa"] = False
    return merged


def _ours(job: TrainingJob, family: Family, dataset: Path, prompts: Path) -> dict[str, Any]:
    spec = job.spec
    config: dict[str, Any] = {
        "pretrained_model_name_or_path": str(job.base_model),
        "network_module": family.network,
        "dataset_config": str(dataset),
        "output_dir": str(_output(job.attempt_folder)),
        "output_name": job.name,
        "save_model_as": "safetensors",
        "save_state": True,
        **_cadence(spec),
        "max_train_steps": spec.steps - job.start_step,
        "seed": (spec.seed + job.start_step) % 2**32,
        "logging_dir": str(job.folder / "tensorboard"),
        "log_with": "tensorboard",
        "tokenizer_cache_dir": str(_hub_cache(job) if GEMMA in family.tokenizers else _tokenizers()),
        "console_log_simple": True,
        "caption_extension": ".txt",
    }
    for role, key in [*family.parts.items(), *family.optional.items()]:
        if role in job.parts:
            config[key] = str(job.parts[role])
    if spec.sample_prompts:
        config |= {"sample_prompts": str(prompts), "sample_at_first": job.start_step == 0}
        config["sample_every_n_steps"] = spec.sample_every_steps or config["max_train_steps"]
    if job.resume_state is not None:
        config |= {"resume": str(job.resume_state), "initial_step": 0}
        config["log_prefix"] = f"from-step-{job.start_step}-"  # TensorBoard's curve of this attempt begins at 1
    return config


def _cadence(spec: RunSpec) -> dict[str, Any]:
    """When it saves weights and a state, of which two are kept."""
    every = steps_between_saves(spec)
    return {"save_every_n_steps": every, "save_last_n_steps_state": every}


SCHEDULE_MODULE = "transformers.optimization."
OF_OTHER_KEYS = {"num_cycles", "power", "timescale", "min_lr_rate", "min_lr_ratio", "num_decay_steps"}
# sd-scripts' schedule → the function behind it, and the arguments that it takes beside the warm-up.
SCHEDULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "constant": ("get_constant_schedule_with_warmup", ()),
    "constant_with_warmup": ("get_constant_schedule_with_warmup", ()),
    "linear": ("get_linear_schedule_with_warmup", ("num_training_steps",)),
    "cosine": ("get_cosine_schedule_with_warmup", ("num_training_steps",)),
    "cosine_with_restarts": (
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        ("num_training_steps", "num_cycles"),
    ),
    "polynomial": ("get_polynomial_decay_schedule_with_warmup", ("num_training_steps", "power")),
    "inverse_sqrt": ("get_inverse_sqrt_schedule", ("timescale",)),
    "cosine_with_min_lr": ("get_cosine_with_min_lr_schedule_with_warmup", ("num_training_steps", "min_lr_rate")),
    "warmup_stable_decay": ("get_wsd_schedule", ("num_training_steps", "num_decay_steps", "min_lr_ratio")),
}


def _schedule(job: TrainingJob) -> dict[str, Any]:
    """The learning rate over the whole run, the same in all attempts.

    By name, sd-scripts would stretch the schedule over the steps that are left. accelerate counts a step for each
    process.
    """
    spec, options = job.spec, job.options
    if options.get("optimizer_type", spec.optimizer) in OWN_SCHEDULE:
        return {"lr_scheduler": "constant"}
    function, names = SCHEDULES[options.get("lr_scheduler", spec.lr_schedule)]
    processes = max(1, len(job.device_uuids))
    values = {
        "num_training_steps": spec.steps * processes,
        "num_cycles": spec.lr_cycles,
        "power": options.get("lr_scheduler_power"),
        "timescale": options.get("lr_scheduler_timescale"),
        "min_lr_rate": options.get("lr_scheduler_min_lr_ratio", 0),
        "min_lr_ratio": options.get("lr_scheduler_min_lr_ratio"),
        "num_decay_steps": int(options.get("lr_decay_steps") or spec.steps // 10 or 1) * processes,
    }
    arguments = {"num_warmup_steps": spec.warmup_steps * processes}
    arguments |= {name: values[name] for name in names if values[name] is not None}
    given = {text.partition("=")[0] for text in options.get("lr_scheduler_args", [])}
    written = [f"{name}={value!r}" for name, value in arguments.items() if name not in given]
    return {
        "lr_scheduler_type": f"{SCHEDULE_MODULE}{function}",
        "lr_scheduler_args": [*written, *options.get("lr_scheduler_args", [])],
        "lr_warmup_steps": 0,
    }


def _as_by_name(keys: dict[str, Any]) -> dict[str, Any]:
    """A configuration that `_schedule` wrote, with the schedule as people write it."""
    if not str(keys.get("lr_scheduler_type", "")).startswith(SCHEDULE_MODULE):
        return keys
    del keys["lr_scheduler_type"]
    arguments = named(keys.pop("lr_scheduler_args", []))
    for ours, theirs in (("num_warmup_steps", "lr_warmup_steps"), ("num_training_steps", "max_train_steps")):
        if ours in arguments:
            keys[theirs] = int(arguments.pop(ours))
    given = [f"{name}={value}" for name, value in arguments.items() if name not in OF_OTHER_KEYS]
    return keys | ({"lr_scheduler_args": given} if given else {})


def _subsets(folders: Mapping[int, Path], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """With those options that are read here only."""
    own = option_table.options_within(options, DATASET)
    return [
        {"image_dir": str(folder), "num_repeats": repeats, "caption_extension": ".txt", **own}
        for repeats, folder in folders.items()
    ]


def _prompts(job: TrainingJob) -> list[dict[str, Any]]:
    spec = job.spec
    return [
        {
            "prompt": prompt,
            "negative_prompt": "",
            "width": spec.resolution,
            "height": spec.resolution,
            "sample_steps": spec.sample_steps,
            "scale": spec.sample_scale,
            "seed": spec.sample_seed + index,
        }
        for index, prompt in enumerate(spec.sample_prompts)
    ]


def _output(attempt_folder: Path) -> Path:
    return attempt_folder / "output"


def _tokenizers() -> Path:
    return workspace.models() / "tokenizers"


# These it looks for in a cache as the hub's own client makes it, where `refs/main` names the snapshot.
OF_THE_HUB = {
    GEMMA: "models--google--gemma-2-2b",
    BYT5: "models--google--byt5-small",
    QWEN: "models--Qwen--Qwen2.5-VL-7B-Instruct",
}
COMMIT = "local"


def _hub_cache(job: TrainingJob) -> Path:
    return job.attempt_folder / "hub"


def _hub(job: TrainingJob) -> tuple[dict[Path, str], dict[Path, Path]]:
    """Files and links of that cache."""
    files: dict[Path, str] = {}
    links: dict[Path, Path] = {}
    for name in OF_THE_HUB.keys() & set(FAMILIES[job.architecture].tokenizers):
        folder = _hub_cache(job) / OF_THE_HUB[name]
        files[folder / "refs" / "main"] = COMMIT
        kept = sorted((_tokenizers() / name).glob("*.*"))
        links |= {folder / "snapshots" / COMMIT / path.name: path for path in kept}
    return files, links


def _has_tokenizer(name: str) -> bool:
    return name in {CLIP_L, CLIP_G, "stabilityai_stable-diffusion-2"} or (_tokenizers() / name).is_dir()


# --- What it prints ---------------------------------------------------------------------------------------------------
BAR = progress_bar("steps", r"(?P<postfix>[^\]]*)")
AVERAGE_LOSS = re.compile(r"avr_loss=([^,\s\]]+)")
SAVING = re.compile(r"saving checkpoint: (.+\.safetensors)$")
STATE_SAVED = re.compile(r"Random states saved in (.+)/random_states_0\.pkl$")
SAMPLING = re.compile(r"generating sample images at step[^:]*: (-?\d+)")
FINISHED = "model saved."
STAGES = {
    "caching latents": "Encoding the pictures",
    "caching Text Encoder outputs": "Encoding the captions",
    "loading model": "Loading the model",
    "loading u-net": "Loading the model",
    "loading Diffusers pretrained": "Loading the model",
    "prepare optimizer": "Preparing the optimizer",
    "generating sample images": "Drawing samples",
}


class _Console:
    """Reads pieces in order. What takes a while (a checkpoint, samples) is taken when the next piece is there."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.step = reading.step

    def read(self, chunk: bytes) -> tuple[list[Observation], int]:
        found: list[Observation] = []
        consumed = 0
        pending: re.Match[str] | None = None
        for piece in pieces(chunk, is_over=self.reading.is_over):
            text = piece.text.strip()
            begun = SAVING.search(text) or SAMPLING.search(text)
            if pending and text and (pending.re is SAVING or BAR.match(text) or (begun and begun.re is SAVING)):
                found += self._finish(pending)
                pending = None
            pending = pending or begun
            if pending is None:
                found += self._observe(text)
                consumed = piece.end
            elif pending.re is SAMPLING:
                found.append(Stage(STAGES["generating sample images"]))
        if pending and self.reading.is_over:
            found += self._finish(pending)
            consumed = len(chunk)
        return found, consumed

    def _observe(self, text: str) -> Iterator[Observation]:
        if bar := BAR.match(text):
            yield from self._progress(bar)
            text = text[bar.end() :].strip()
        if saved := STATE_SAVED.search(text):
            yield from self._state(Path(saved[1]))
        elif stage := next((name for mark, name in STAGES.items() if text.startswith(mark)), ""):
            yield Stage(stage)

    def _progress(self, bar: re.Match[str]) -> Iterator[Observation]:
        count = int(bar["steps"])
        self.step = self.reading.start_step + count
        total = max(self.reading.spec.steps, self.step)
        if count == 0:
            yield Started(self.reading.start_step, total)
            return
        average = AVERAGE_LOSS.search(bar["postfix"] or "")
        if average is None:
            return
        loss, speed = float(average[1]), steps_per_second(bar)
        yield Progress(
            self.step,
            total,
            time.time(),
            loss=loss,
            steps_per_second=speed,
            eta_seconds=(total - self.step) / speed if speed else None,
        )
        if math.isnan(loss):
            yield Hopeless()

    def _finish(self, begun: re.Match[str]) -> Iterator[Observation]:
        return self._checkpoint(Path(begun[1])) if begun.re is SAVING else self._samples(int(begun[1]))

    def _checkpoint(self, printed: Path) -> Iterator[Observation]:
        reading = self.reading
        is_final = printed.name == f"{reading.name}.safetensors"
        every = reading.spec.save_every_steps
        source = _output(reading.attempt_folder) / printed.name
        if not is_final and not every:
            source.unlink(missing_ok=True)  # it came with a state; the user wants the last one only
            return
        name = printed.name if is_final else f"{reading.name}-step{self.step:08d}.safetensors"
        steps = {"ss_steps": str(self.step), "ss_max_train_steps": str(reading.spec.steps)}  # its own begin at a resume
        facts = {**reading.provenance, **steps}
        collected = collect(source, reading.folder / name, facts)
        if collected is None:
            yield Noted(f"{printed.name} was announced, but is no complete file.")
            return
        yield CheckpointSaved(name, self.step, collected.bytes, collected.sha256, is_final)

    def _state(self, printed: Path) -> Iterator[Observation]:
        """One with all steps is none to go on from: sd-scripts refuses to train nothing, and would save no LoRA."""
        if self.step >= self.reading.spec.steps:
            return
        state = _output(self.reading.attempt_folder) / printed.name
        if state.is_dir():
            (state / STEP_FILE).write_text(json.dumps({"step": self.step}))
            _drop_old_states(self.reading)
            yield StateSaved(state.relative_to(self.reading.folder).as_posix(), self.step)

    def _samples(self, own_step: int) -> Iterator[Observation]:
        """`own_step` is sd-scripts' count, by which it names the files."""
        reading = self.reading
        step = self.step if own_step else 0
        folder = _output(reading.attempt_folder) / "sample"
        count = f"{own_step:06d}" if own_step else "e000000"  # those before the first step bear the epoch
        for path in sorted(folder.glob(f"{reading.name}_{count}_*.png")):
            index = int(path.name.removeprefix(f"{reading.name}_").split("_")[1])
            if index >= len(reading.spec.sample_prompts):
                continue
            target = reading.folder / "samples" / f"step{step:08d}-{index:02d}.png"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
            prompt = reading.spec.sample_prompts[index]
            yield SampleDrawn(
                target.relative_to(reading.folder).as_posix(), step, index, prompt, "", reading.spec.sample_seed + index
            )


# --- States and the end -----------------------------------------------------------------------------------------------
STEP_FILE = "lorapilot.json"  # in a state: the true step; written when the state was seen to be complete
STATES_KEPT = 2


def _states(folder: Path) -> list[tuple[Path, int]]:
    """Newest first."""
    found = []
    for marker in folder.glob(f"_attempts/*/output/*-state/{STEP_FILE}"):
        try:
            step = int(json.loads(marker.read_text())["step"])
        except (OSError, ValueError, KeyError):
            continue
        found.append((marker.parent, step))
    return sorted(found, key=lambda state: (state[1], state[0].stat().st_mtime), reverse=True)


def _drop_old_states(reading: Reading) -> None:
    """Those of earlier attempts, once there are enough newer ones. sd-scripts drops its own."""
    mine = _output(reading.attempt_folder)
    for state, _ in _states(reading.folder)[STATES_KEPT:]:
        if state.parent != mine:
            shutil.rmtree(state, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Told:
    """What the attempt's part of the log says. `step`: the last one; `nan_step`: the first whose loss was no number."""

    step: int
    nan_step: int | None
    is_saved: bool


def _told(reading: Reading) -> Told:
    step, nan_step, is_saved = 0, None, False
    for text in log_pieces(reading.log, reading.log_offset):
        if bar := BAR.match(text.strip()):
            step = reading.start_step + int(bar["steps"])
            average = AVERAGE_LOSS.search(bar["postfix"] or "")
            nan_step = step if nan_step is None and average and average[1] == "nan" else nan_step
        is_saved = is_saved or FINISHED in text
    return Told(step, nan_step, is_saved)


def _unfinished(reading: Reading, told: Told) -> str:
    """Why the attempt did not finish; empty when it proved that it did."""
    if not told.is_saved:
        return "sd-scripts ended without saving a LoRA."
    if told.step < reading.spec.steps:
        return f"sd-scripts ended after {told.step:,} of {reading.spec.steps:,} steps."
    if not (reading.folder / f"{reading.name}.safetensors").is_file():
        return f"sd-scripts finished, but {reading.name}.safetensors is gone. Was it moved or deleted?"
    return ""


FAILURES = (
    failure(
        r"No data found\. Please verify arguments",
        "sd-scripts found no picture that it can read. Check the dataset's pictures.",
    ),
    failure(
        r"provided pretrained_model_name_or_path \"([^\"]+)\" is neither a valid local path nor a valid repo id"
        r"|model is not found as a file or in Hugging Face",
        "sd-scripts found no base model at its path. Check the model on the Models page.",
    ),
    failure(
        r"expected str, bytes or os\.PathLike object, not NoneType",
        "sd-scripts has no tokenizer for this model: get it on the Models page, or with `manage.py models pull`.",
    ),
    failure(
        r"extra keys not allowed @ data\[(.+?)\]$",
        "This version of sd-scripts does not know the dataset option {0}: update sd-scripts, or leave the option out.",
    ),
    failure(
        r"error: unrecognized arguments: (.+)",
        "This version of sd-scripts does not know {0}: LoRA Pilot is tested with v0.10.1.",
    ),
    failure(
        r"max_train_steps should be greater than initial step",
        "This run has all its steps already: there is nothing left to resume.",
    ),
    failure(
        r"NaN detected in latents: (.+)",
        "The VAE made no numbers of {0}. Turn no_half_vae on, or use a VAE that is made for 16 bits.",
    ),
    failure(
        r"(?:No|no) module named 'bitsandbytes'|bitsandbytes is not installed|No bitsandbytes",
        "This optimizer needs bitsandbytes in the trainer's Python: install it there, or choose another optimizer.",
    ),
    failure(
        r"No xformers|xformers is not|xformersがインストールされていない",
        "xformers is missing in the trainer's Python: install it there, or leave the option xformers out.",
    ),
)
