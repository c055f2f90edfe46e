"""For every optimizer: steps in one go, and with the state saved to disk and loaded in the middle. Prints which differ.

Then a state is taken up under other configurations.
Arguments: the base model's folder, a dataset manifest, a folder to write to.
"""

import dataclasses
import json
import shutil
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
from lora_trainer.state import TrainingState, load_state, save_state

OPTIMIZERS = [name for name in config.OPTIMIZERS if name != "AdamW8bit"]  # which needs a GPU
STEPS, BREAK = 4, 2
torch.set_num_threads(1)
model_folder, manifest, folder = map(Path, sys.argv[1:])
accelerator = Accelerator(cpu=True)


def new_loop(optimizer: str = "AdamW", *, pictures: int = 5, **changes: object) -> Loop:
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
            "train_batch_size": 1,
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
    del dataset.pictures[pictures:]
    order = BatchOrder(dataset, options.train_batch_size, options.seed)
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
    steps(whole, BREAK)
    saved = save_state(folder / optimizer, whole.state({}, ""))
    steps(whole, STEPS - BREAK)
    second = new_loop(optimizer)
    second.restore(load_state(saved))
    steps(second, STEPS - BREAK)
    one, other = whole.state({}, ""), second.state({}, "")
    moved = any(bool(tensor.any()) for name, tensor in one.lora.items() if name.endswith(".up"))
    equal = all(torch.equal(one.lora[name], other.lora[name]) for name in one.lora)
    if not (moved and equal and one.step == other.step == STEPS):
        different.append(optimizer)


SAVED = folder / "AdamW" / f"step{BREAK:08d}"
OF_FORMAT_2 = folder / "format 2"


def write_format_2() -> None:
    """The state as it was written before it knew what it was saved under."""
    shutil.copytree(SAVED, OF_FORMAT_2)
    facts = json.loads((OF_FORMAT_2 / "state.json").read_text())
    known = {name: facts[name] for name in ("step", "batches_per_epoch", "validation", "recipe")}
    (OF_FORMAT_2 / "state.json").write_text(json.dumps({"format": 2, **known}))
    (OF_FORMAT_2 / "COMPLETE").write_bytes(b"")


def refusal(loop: Loop, state: TrainingState) -> str:
    try:
        loop.restore(state)
    except ConfigError as error:
        return str(error)
    return ""


def adapted(path: Path = SAVED, *, stops: bool = False, **changes: object) -> dict[str, object]:
    """The state under another configuration: what is told and taken; `stops`: is a second stop an exact one?"""
    saved = load_state(path)
    loop = new_loop(**changes)
    facts: dict[str, object] = {"told": loop.restore(saved)}
    taken = loop.state({}, "")
    steps(loop, 1)
    new = save_state(folder / "again", loop.state({}, ""))
    steps(loop, STEPS - BREAK - 1)
    ended = loop.state({}, "")
    facts |= {
        "place": list(dataclasses.astuple(loop.plan.start)),
        "step": taken.step,
        "taken": all(torch.equal(taken.lora[name], saved.lora[name]) for name in saved.lora)
        and all(map(torch.equal, taken.ema["means"], saved.ema["means"]))
        and torch.equal(taken.generators[0]["noise"], saved.generators[0]["noise"]),
        "moments": len(taken.optimizer["state"]) > 0,
        "trained": any(not torch.equal(ended.lora[name], taken.lora[name]) for name in ended.lora),
    }
    if stops:
        again = new_loop(**changes)
        facts["told_again"] = again.restore(load_state(new))
        steps(again, STEPS - BREAK - 1)
        other = again.state({}, "")
        facts["exact_again"] = all(torch.equal(ended.lora[name], other.lora[name]) for name in ended.lora)
    return facts


write_format_2()
state = load_state(SAVED)
other_batches = new_loop(train_batch_size=2, gradient_accumulation_steps=1)
refused = [
    refusal(new_loop(network_dim=3), state),
    refusal(new_loop(pictures=4), state),
    refusal(new_loop(ema_decay=0.0), state),
    refusal(other_batches, load_state(OF_FORMAT_2)),
    refusal(other_batches, dataclasses.replace(state, generators=state.generators * 2)),
]
print(
    json.dumps(
        {
            "tried": OPTIMIZERS,
            "different": different,
            "refused": refused,
            "adapted": {
                "format 2": adapted(OF_FORMAT_2),
                "batch": adapted(train_batch_size=2, gradient_accumulation_steps=1, stops=True),
                "resolution": adapted(resolution=32, min_bucket_reso=32),
                "optimizer": adapted(optimizer_type="Lion", stops=True),
            },
        }
    )
)
