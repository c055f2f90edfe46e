"""Run as a script: what the shipped base model makes of the demo's pictures and captions, without, into and out of a
cache; summaries and digests as JSON. Argument: the folder of the cache.
"""

import importlib.util
import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ASSETS = REPOSITORY / "lora_trainer" / "assets"


def start_like_the_trainer():
    spec = importlib.util.spec_from_file_location("start", REPOSITORY / "lora_trainer" / "__main__.py")
    start = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(start)
    start.register_package()
    start.hide_neighbours()
    start.stay_offline()
    start.stay_quiet()


start_like_the_trainer()

import torch  # noqa: E402

from lora_trainer import config  # noqa: E402
from lora_trainer.architectures import load_base_model  # noqa: E402
from lora_trainer.architectures.base import LoadOptions  # noqa: E402
from lora_trainer.cache import DiskCache, tensors_digest  # noqa: E402
from lora_trainer.data import read_dataset  # noqa: E402
from lora_trainer.encoding import Latents, Texts, Use  # noqa: E402

torch.set_num_threads(1)
work = Path(sys.argv[1])
manifest = work / "set.jsonl"
pictures = sorted((ASSETS / "demo-dataset").glob("*.png"))[:3]
manifest.write_text(
    "\n".join(json.dumps({"image": str(one), "caption": one.with_suffix(".txt").read_text()}) for one in pictures)
)
needed = {"pretrained_model_name_or_path": "m", "output_dir": "o", "resolution": 64, "dataset_manifest": str(manifest)}
dataset = read_dataset(config.from_table(needed))


def load():
    options = LoadOptions(
        path=ASSETS / "pilot-tiny", vae=None, device=torch.device("cpu"), dtype=torch.float32, max_token_length=75,
        clip_skip=0, v_parameterization=None,
    )  # fmt: skip
    return load_base_model(options)


def facts(model, cache):
    latents = Latents(model, dataset.pictures, keep=True, cache=cache)
    latents.fill(with_flips=True, report=lambda *_: None)
    texts = Texts(model, keep=True, cache=cache)
    texts.fill([*(one.caption for one in dataset.pictures), ""], lambda *_: None)
    batch = latents.batch([Use(index, flipped) for index in range(3) for flipped in (False, True)])
    condition = texts.batch([one.caption for one in dataset.pictures])
    found = tensors_digest({"latents": batch, "sequence": condition.sequence, "pooled": condition.pooled})
    return [latents.summary(), texts.summary(), list(batch.shape), list(condition.sequence.shape), found]


model, again = load(), load()
sys.stdout.write(json.dumps([facts(model, None), *(facts(one, DiskCache(work / "cache")) for one in (model, again))]))
