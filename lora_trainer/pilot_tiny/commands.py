"""What the command line does; each function takes its parsed options."""

import json
import time
from argparse import Namespace
from pathlib import Path
from random import Random
from typing import Any

import diffusers
import diffusers.utils.logging
import torch
import transformers
import transformers.utils.logging

from lora_trainer.console import Console
from lora_trainer.pilot_tiny.build import build_pipeline
from lora_trainer.pilot_tiny.draw import contact_sheet, draw_scene, random_scene, write_caption
from lora_trainer.pilot_tiny.evaluate import draw_with, scenes_to_ask, score_pictures, score_report
from lora_trainer.pilot_tiny.progress import Steps
from lora_trainer.pilot_tiny.train_unet import train_unet
from lora_trainer.pilot_tiny.train_vae import train_vae

SHEET_COLUMNS = 12


def draw(options: Namespace) -> None:
    """Write `0001.png` with `0001.txt` and so on."""
    random = Random(options.seed)  # noqa: S311 - reproducible, not secret
    options.out.mkdir(parents=True, exist_ok=True)
    for number in range(1, options.count + 1):
        scene = random_scene(random)
        draw_scene(scene, random).save(options.out / f"{number:04}.png")
        (options.out / f"{number:04}.txt").write_text(write_caption(scene, random) + "\n", encoding="utf-8")


def build(options: Namespace) -> None:
    """Write the untrained model."""
    torch.set_num_threads(options.threads)
    _save(build_pipeline(options.seed), options.out)


def train(options: Namespace) -> None:
    """Train one part of a model and write the whole model; the state is `<out>.state`."""
    torch.set_num_threads(options.threads)
    pipeline = _load(options.start)
    state = options.out.with_name(f"{options.out.name}.state")
    report = Console().line
    common = {
        "steps": Steps(options.steps, options.stop_after),
        "pictures": options.pictures,
        "learning_rate": options.learning_rate,
    }
    common |= {"seed": options.seed, "state": state, "report": report}
    begun = time.monotonic()
    if options.part == "unet":
        train_unet(pipeline, **common, batch=options.batch)
    else:
        train_vae(pipeline.vae, **common, decoder_only=options.part == "decoder")
    report(f"{(time.monotonic() - begun) / 60:.1f} minutes")
    _save(pipeline, options.out)


def evaluate(options: Namespace) -> None:
    """Print the score of a model, and of what its prompts look like when drawn by hand."""
    torch.set_num_threads(options.threads)
    pipeline = _load(options.model)
    if options.lora:
        pipeline.load_lora_weights(str(options.lora))
    scenes = scenes_to_ask(options.prompts)
    pictures = draw_with(
        pipeline, [scene.prompt for scene in scenes], steps=options.steps, guidance=options.guidance, seed=options.seed
    )
    random = Random(options.seed)  # noqa: S311 - reproducible, not secret
    drawn = [draw_scene(scene, random) for scene in scenes]
    console = Console()
    console.line(f"Generated: {score_report(score_pictures(scenes, pictures))}")
    console.line(f"Drawn: {score_report(score_pictures(scenes, drawn))}")
    if options.out:
        contact_sheet(pictures, SHEET_COLUMNS).save(options.out)


def _load(folder: Path) -> Any:
    """In float32, in which a CPU is both faster and more exact."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipeline_class: Any = diffusers.StableDiffusionXLPipeline
    pipeline = pipeline_class.from_pretrained(
        str(folder), dtype=torch.float32, use_safetensors=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _save(pipeline: Any, folder: Path) -> None:
    """In float16, which halves the files and changes no picture visibly."""
    pipeline.to(torch.float16).save_pretrained(folder)
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        settings = json.loads(path.read_text(encoding="utf-8"))
        # the folder from which a part was loaded says nothing on another machine
        settings.pop("_name_or_path", None)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
