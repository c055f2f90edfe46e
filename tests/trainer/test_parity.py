"""Step-by-step comparison with sd-scripts: our half of it, on what sd-scripts' own training loop recorded.

data/parity/README.md says how the recordings were made, and docs/trainer.md what was measured.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from lora_trainer import noise as noise_module
from lora_trainer.adapter import add_lora
from lora_trainer.architectures import load_base_model
from lora_trainer.architectures.base import LoadOptions
from lora_trainer.buckets import BucketRules, Placement, bucket_sizes, place
from lora_trainer.captions import CaptionRules
from lora_trainer.config import from_table
from lora_trainer.data import Picture
from lora_trainer.loop import Loop
from lora_trainer.noise import NoiseProcess
from lora_trainer.plan import make_plan, make_schedule
from tests.trainer.parity_base import KINDS, SCHEDULER, base_digest, lora_tensor, projections, write_base

DATA = Path(__file__).parent / "data" / "parity"
STEPS = 20
CAPTIONS = [
    "a red circle on a blue background",
    "",
    "sks face, a green square with a yellow triangle, " * 12 + "end",
    "a white cross! and 3 black stars",
    "the quick brown fox jumps over the lazy dog, " * 5,
    "sks face on a grey background",
]
RECIPES = {
    "sdxl": {"optimizer_type": "SGD", "unet_lr": 1.0, "text_encoder_lr": 0.5},
    "sd15": {
        "optimizer_type": "AdamW",
        "optimizer_args": ["weight_decay=0.05"],
        "unet_lr": 2e-3,
        "text_encoder_lr": 1e-3,
        "max_token_length": 150,
        "clip_skip": 2,
    },
}


def table(name):
    return json.loads((DATA / name).read_text())


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: write_base(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def inputs():
    return load_file(DATA / "inputs.safetensors")


# --- training ---------------------------------------------------------------------------------------------------------


class Replayed:
    """The recorded inputs in place of a dataset: its pictures, their latents and their order."""

    batches_per_epoch = STEPS

    def __init__(self, inputs):
        self._inputs = inputs
        self.pictures = [self._picture(*row) for row in zip(inputs["sizes"].tolist(), CAPTIONS, strict=True)]

    @staticmethod
    def _picture(size, caption):
        height, width, top, left, target_height, target_width = size
        bucket = target_width, target_height
        placement = Placement(bucket, (target_width + 2 * left, target_height + 2 * top), (left, top))
        return Picture(Path("unused"), caption, 1, "", (width, height), placement, caption is CAPTIONS[-1])

    def epoch(self, number):
        return self._inputs["pictures"].tolist()

    def batch(self, uses):
        return self._inputs["latents"][[use.index for use in uses]]


class ReplayedNoise(NoiseProcess):
    """Draws what was recorded."""

    def replay(self, inputs):
        self._recorded = zip(inputs["noise"], inputs["timesteps"], strict=True)
        return self

    def draw(self, latents, generator):
        noise, timesteps = next(self._recorded)
        return self.at(latents, timesteps, noise)


def configuration(kind, **changes):
    return from_table(
        {
            "pretrained_model_name_or_path": kind,
            "dataset_manifest": "unused",
            "output_dir": "unused",
            "network_dim": 2,
            "network_alpha": 3,
            "network_args": ["conv_dim=1", "conv_alpha=0.5"],
            "train_batch_size": 2,
            "max_train_steps": STEPS,
            "learning_rate": 7.0,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 3,
            "min_snr_gamma": 5,
            "noise_offset": 0.1,
            "adaptive_noise_scale": 0.05,
            "prior_loss_weight": 0.7,
        }
        | RECIPES[kind]
        | changes
    )


def load(folder, config):
    return load_base_model(
        LoadOptions(
            path=folder,
            vae=None,
            device=torch.device("cpu"),
            dtype=torch.float32,
            max_token_length=config.max_token_length,
            clip_skip=config.clip_skip,
            v_parameterization=None,
        )
    )


def kohya_tensors(pairs):
    """Name in Kohya's file -> parameter, in the order of the recording."""
    tensors = {}
    for pair in sorted(pairs, key=lambda pair: pair.file_name):
        tensors |= {f"{pair.file_name}.lora_down.weight": pair.down, f"{pair.file_name}.lora_up.weight": pair.up}
    return tensors


def make_loop(kind, folder, inputs, **changes):
    """The real loop on the recorded inputs, and its LoRA."""
    config = configuration(kind, **changes)
    model = load(folder, config)
    pairs = add_lora(model, config)
    with torch.no_grad():
        for name, parameter in kohya_tensors(pairs).items():
            parameter.copy_(lora_tensor(name, tuple(parameter.shape)))
    replayed = Replayed(inputs)
    loop = Loop(
        config,
        make_plan(config, STEPS),
        accelerator=Accelerator(cpu=True),
        model=model,
        pairs=pairs,
        pictures=replayed.pictures,
        latents=replayed,
        texts=None,  # the text encoders are trained, so nothing is encoded beforehand
        noise=ReplayedNoise(model.scheduler_config, model.prediction, config).replay(inputs),
        order=replayed,
    )
    return loop, pairs


def lengths_of_differences(tensors, recorded):
    """[tensors]: estimated length of each tensor's difference to sd-scripts'."""
    ours = np.stack([projections(name, parameter.detach()) for name, parameter in tensors.items()])
    return np.sqrt(np.square(ours - recorded["projections"].numpy()).mean(axis=1))


def length(values):
    return float(np.sqrt(np.square(np.asarray(values)).sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_training_ends_with_sd_scripts_weights(kind, bases, inputs):
    facts, recorded = table(f"{kind}.json"), load_file(DATA / f"{kind}.safetensors")
    assert base_digest(bases[kind]) == facts["base_sha256"], "the base model is not the one of the recording"
    loop, pairs = make_loop(kind, bases[kind], inputs)
    modules = "".join(f"{pair.file_name} {pair.alpha:g}\n" for pair in sorted(pairs, key=lambda pair: pair.file_name))
    assert modules == (DATA / f"{kind}-modules.txt").read_text()

    results = [loop.advance() for _ in range(facts["steps"])]

    assert [one.learning_rate for one in results] == pytest.approx(facts["learning_rates"], rel=1e-12)
    assert [one.loss for one in results] == pytest.approx(facts["losses"], rel=1e-5)
    assert [one.grad_norm for one in results] == pytest.approx(facts["grad_norms"], rel=2e-4)
    tensors = kohya_tensors(pairs)
    differences = lengths_of_differences(tensors, recorded)
    assert length(differences) <= 1e-5 * length(recorded["weight"])
    # the bound for AdamW is three times what sd-scripts differs from itself between one and two threads
    bound = 3 * facts["self_difference"] if "self_difference" in facts else 1e-4
    assert length(differences) <= bound * length(recorded["change"])
    # a tensor without a gradient, such as the last layer's where only the one before is used, stays as it was
    unmoved = recorded["change"].numpy() == 0
    assert unmoved.any()
    assert not differences[unmoved].any()
    for name in recorded.keys() & tensors.keys():
        torch.testing.assert_close(tensors[name].detach(), recorded[name], rtol=1e-4, atol=1e-5)


def test_one_percent_more_alpha_would_be_seen(bases, inputs):
    facts = table("sd15.json")
    loop, _ = make_loop("sd15", bases["sd15"], inputs, network_alpha=3.03)
    assert loop.advance().loss != pytest.approx(facts["losses"][0], rel=2e-4)


# --- single formulas --------------------------------------------------------------------------------------------------


def test_noise_offset_is_sd_scripts(inputs, monkeypatch):
    process = NoiseProcess(SCHEDULER, "epsilon", configuration("sd15"))
    for step in range(2):
        drawn = iter([inputs["plain_noise"][step], inputs["offset_noise"][step]])
        monkeypatch.setattr(noise_module, "_normal", lambda shape, like, generator, drawn=drawn: next(drawn))
        latents = inputs["latents"][inputs["pictures"][step]]
        batch = process.draw(latents, torch.Generator())
        torch.testing.assert_close(batch.target, inputs["noise"][step], rtol=1e-6, atol=1e-6)


def test_losses_and_their_weights_are_sd_scripts(inputs):
    timesteps = torch.tensor([0, 5, 100, 700, 998, 999])
    noise, answer = inputs["noise"][:3].flatten(0, 1), inputs["noise"][3:6].flatten(0, 1)
    for row in table("losses.json"):
        changes = {"min_snr_gamma": 0.0} | row["options"]
        prediction = "v_prediction" if changes.pop("v_parameterization", False) else "epsilon"
        process = NoiseProcess(SCHEDULER, prediction, configuration("sd15", **changes))
        batch = process.at(inputs["latents"], timesteps, noise)
        assert batch.noisy[:, 0, 0, 0].tolist() == pytest.approx(row["noisy"], rel=1e-5), row["options"]
        assert process.loss(answer, batch).tolist() == pytest.approx(row["losses"], rel=1e-5), row["options"]


def test_learning_rates_are_sd_scripts():
    for row in table("schedules.json"):
        options = {"learning_rate": 0.01} | row["options"]
        schedule = make_schedule(configuration("sd15", **options), STEPS)
        rates = [0.01 * schedule.factor(step) for step in range(STEPS)]
        assert rates == pytest.approx(row["rates"], rel=1e-9, abs=1e-15), row["options"]


def test_buckets_are_sd_scripts():
    for group in table("buckets.json"):
        rules = BucketRules(**group["rules"] | {"resolution": tuple(group["rules"]["resolution"]), "enabled": True})
        for width, height, *expected in group["places"]:
            placed = place((width, height), rules)
            assert [*placed.bucket, *placed.resized] == expected, (group["rules"], width, height)
            assert rules.no_upscale or placed.bucket in bucket_sizes(rules)


def test_captions_are_processed_in_sd_scripts_order():
    class Draws:
        """The recorded numbers; shuffling is turning round."""

        def __init__(self, numbers):
            self._numbers = iter(numbers)

        def uniform(self):
            return next(self._numbers)

        def permutation(self, count):
            return list(reversed(range(count)))

    for row in table("captions.json"):
        rules = CaptionRules.from_config(configuration("sd15", **row["options"]))
        assert rules.caption_for(row["caption"], row["epoch"], Draws(row["draws"])) == row["result"], row


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_encoded_like_sd_scripts(kind, bases):
    recorded = load_file(DATA / "encodings.safetensors")
    model = load(bases[kind], configuration(kind))
    for tokens, clip_skip in itertools.product((75, 150, 225), (0,) if kind == "sdxl" else (0, 2)):
        model._options = replace(model._options, max_token_length=tokens, clip_skip=clip_skip)
        ids = model.tokenize(CAPTIONS)
        for number, one in enumerate(ids, 1):
            # the first text encoders of both kinds have the same tokenizer
            assert torch.equal(one, recorded[f"sdxl/{tokens}/ids{number}"].long())
        with torch.no_grad():
            encoded = model.encode(ids)
        assert encoded.sequence.shape[1] == tokens + 2
        states = recorded[f"sdxl/{tokens}/states" if kind == "sdxl" else f"sd15/{tokens}/states/{clip_skip}"]
        torch.testing.assert_close(encoded.sequence[:, ::15], states, rtol=1e-5, atol=1e-5)
        if kind == "sdxl":
            torch.testing.assert_close(encoded.pooled, recorded[f"sdxl/{tokens}/pooled"], rtol=1e-5, atol=1e-5)
