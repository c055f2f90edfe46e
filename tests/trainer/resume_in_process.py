"""For every optimizer: steps in one go, and with the state saved to disk and loaded in the middle. Prints which differ.

Arguments: the base model's folder, a dataset manifest, a folder to write to.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from lora_trainer import adapter, config
from lora_trainer.architectures import load_base_model
from lora_trainer.architectures.base import LoadOptions
from lora_trainer.data import BatchOrder, read_dataset
from lora_trainer.encoding import Latents, Texts
from lora_trainer.errors import ConfigError
from lora_trainer.loop import Loop
from lora_trainer.noise import NoiseProcess
from lora_trainer.plan import make_plan
from lora_trainer.state import load_state, save_state

OPTIMIZERS = [name for name in config.OPTIMIZERS if name != "AdamW8bit"]  # which needs a GPU
STEPS, BREAK = 4, 2
torch.set_num_threads(1)
model_folder, manifest, folder = map(Path, sys.argv[1:])
accelerator = Accelerator(cpu=True)


def new_loop(optimizer: str, batch_size: int = 1, **changes: object) -> Loop:
    options = config.from_table(
        {
            "pretrained_model_name_or_path": str(model_folder),
            "dataset_manifest": str(manifest),
            "output_dir": str(folder),
            "resolution": 64,
            "network_dim": 2,
            "network_dropout": 0.1,
            "network_train_unet_only": True,
            "optimizer_type": optimizer,
            "learning_rate": 1.0 if optimizer == "Prodigy" else 1e-3,
            "lr_scheduler": "constant" if optimizer == "AdamWScheduleFree" else "cosine",
            "max_train_steps": STEPS,
            "gradient_accumulation_steps": 2,
            "ema_decay": 0.0 if optimizer == "AdamWScheduleFree" else 0.5,
            "threads": 1,
        }
        | changes
    )
    model = load_base_model(
        LoadOptions(
            path=model_folder,
            vae=None,
            device=accelerator.device,
            dtype=torch.float32,
            max_token_length=75,
            clip_skip=0,
            v_parameterization=None,
        )
    )
    dataset = read_dataset(options)
    order = BatchOrder(dataset, batch_size, options.seed)
    loop = Loop(
        options,
        make_plan(options, order.batches_per_epoch),
        accelerator=accelerator,
        model=model,
        pairs=adapter.add_lora(model, options),
        pictures=dataset.pictures,
        latents=Latents(model, dataset.pictures, keep=True),
        texts=Texts(model, keep=True),
        noise=NoiseProcess(model.scheduler_config, model.prediction, options),
        order=order,
    )
    model.unet.train()
    return loop


def steps(loop: Loop, count: int) -> None:
    for _ in range(count):
        loop.advance()
        with loop.weights_to_keep():  # as a checkpoint does it
            pass


different = []
for optimizer in OPTIMIZERS:
    whole = new_loop(optimizer)
    steps(whole, STEPS)
    first = new_loop(optimizer)
    steps(first, BREAK)
    saved = save_state(folder / optimizer, first.state({}, ""))
    second = new_loop(optimizer)
    second.restore(load_state(saved))
    steps(second, STEPS - BREAK)
    one, other = whole.state({}, ""), second.state({}, "")
    moved = any(bool(tensor.any()) for name, tensor in one.lora.items() if name.endswith(".up"))
    equal = all(torch.equal(one.lora[name], other.lora[name]) for name in one.lora)
    if not (moved and equal and one.step == other.step == STEPS):
        different.append(optimizer)


def refusal(loop: Loop) -> str:
    try:
        loop.restore(load_state(folder / "AdamW" / f"step{BREAK:08d}"))
    except ConfigError as error:
        return str(error)
    return ""


others = new_loop("AdamW", network_dim=3), new_loop("AdamW", batch_size=2), new_loop("AdamW", ema_decay=0.0)
print(json.dumps({"tried": OPTIMIZERS, "different": different, "refused": [refusal(loop) for loop in others]}))
