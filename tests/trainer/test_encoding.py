"""With a base model of a few numbers, and once with the one that ships with the trainer."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lora_trainer import config
from lora_trainer.architectures.base import Conditioning
from lora_trainer.cache import DiskCache
from lora_trainer.data import read_dataset
from lora_trainer.encoding import COLOUR_CHANGE, Latents, Texts, Use, draw_use, pixels, time_ids
from lora_trainer.errors import DatasetError, ModelError

FOLDER = Path(__file__).parent
BUCKETS = {"enable_bucket": True, "min_bucket_reso": 32, "bucket_reso_steps": 32}


class TinyModel:
    """A convolution for a VAE and a table of vectors for a text encoder; counts what it encodes."""

    def __init__(self, seed=1, scale=0.5, skipped=0, length=8):
        torch.manual_seed(seed)
        self.vae = torch.nn.Conv2d(3, 4, 8, stride=8).requires_grad_(False)
        self.text_encoders = [torch.nn.Embedding(128, 6).requires_grad_(False)]
        self.scale, self.skipped, self.length = scale, skipped, length
        self.pictures = self.captions = 0

    def latents_of(self, images):
        self.pictures += len(images)
        return self.vae(images) * self.scale

    def tokenize(self, captions):
        rows = [[ord(letter) for letter in caption.ljust(self.length)[: self.length]] for caption in captions]
        return [torch.tensor(rows)[:, None]]

    def encode(self, tokens):
        self.captions += len(tokens[0])
        sequence = self.text_encoders[0](tokens[0][:, 0]) / (1 + self.skipped)
        return Conditioning(sequence, sequence.mean(1))


def settings(**changes):
    needed = {"pretrained_model_name_or_path": "/model", "output_dir": "/out", "resolution": 64}
    return config.from_table(needed | {"train_data_dir": "x"} | changes)


def picture_file(path, size, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return values


def pictures_of(folder, **changes):
    return read_dataset(settings(train_data_dir=str(folder), **changes)).pictures


@pytest.fixture
def pictures(tmp_path):
    for index in range(3):
        picture_file(tmp_path / "data" / "1_face" / f"{index}.png", (64, 64), index)
    return pictures_of(tmp_path / "data")


def silent(done, total):
    pass


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_pixels_are_the_middle_of_the_picture_from_minus_one_to_one(tmp_path):
    values = picture_file(tmp_path / "1_face" / "a.png", (84, 64))
    [picture] = pictures_of(tmp_path)
    expected = torch.from_numpy(values[:, 10:74].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(pixels(picture, Use(0)), expected)
    assert torch.equal(pixels(picture, Use(0, flipped=True)), expected.flip(2))
    assert (expected.min(), expected.max()) == (-1, 1)


def test_pixels_are_cut_where_the_use_says(tmp_path):
    values = picture_file(tmp_path / "1_face" / "a.png", (84, 64))
    [picture] = pictures_of(tmp_path)
    part = torch.from_numpy(values[:, 20:84].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(pixels(picture, Use(0, crop=(20, 0))), part)
    assert torch.equal(pixels(picture, Use(0, crop=(20, 0), flipped=True)), part.flip(2))


def test_resized_pixels_are_those_of_a_lanczos_filter(tmp_path):
    picture_file(tmp_path / "1_face" / "a.png", (256, 128))
    [picture] = pictures_of(tmp_path)
    with Image.open(picture.path) as image:
        small = image.resize((128, 64), Image.Resampling.LANCZOS).crop((32, 0, 96, 64))
    expected = torch.from_numpy(np.array(ImageOps.mirror(small))).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(pixels(picture, Use(0, flipped=True)), expected)


def test_colours_are_multiplied(tmp_path):
    (tmp_path / "1_face").mkdir()
    Image.new("RGB", (64, 64), (100, 150, 200)).save(tmp_path / "1_face" / "a.png")
    [picture] = pictures_of(tmp_path)

    def colour(*factors):
        found = pixels(picture, Use(0, colour=factors))
        assert torch.equal(found, found[:, :1, :1].expand_as(found))
        return [round((float(value) + 1) * 127.5) for value in found[:, 0, 0]]

    assert colour(1.0, 1.0, 1.0) == [100, 150, 200]
    assert colour(1.1, 1.0, 1.0) == [110, 165, 220]
    # towards and away from the picture's mean grey, 141: 0.299 of 100 + 0.587 of 150 + 0.114 of 200
    assert colour(1.0, 0.5, 1.0) == [120, 145, 170]
    assert colour(1.0, 1.0, 0.0) == [141, 141, 141]


def test_picture_that_changed_since_it_was_read_is_refused(tmp_path, pictures):
    picture_file(pictures[1].path, (64, 80))
    with pytest.raises(DatasetError, match=r"1\.png was changed while the run was starting; start again"):
        pixels(pictures[1], Use(1))


def test_time_ids_are_sizes_and_what_was_cut_off(tmp_path):
    picture_file(tmp_path / "1_face" / "a.png", (300, 100))
    [picture] = pictures_of(tmp_path, **BUCKETS)
    # 300x100 covers 96x32 exactly once it is 96x32
    assert time_ids(picture, Use(0)) == [100, 300, 0, 0, 32, 96]
    [square] = pictures_of(tmp_path)
    # 192x64 after resizing; 128 columns too many
    assert time_ids(square, Use(0)) == [100, 300, 0, 64, 64, 64]
    assert time_ids(square, Use(0, crop=(30, 0))) == [100, 300, 0, 30, 64, 64]
    assert time_ids(square, Use(0, crop=(30, 0), flipped=True)) == [100, 300, 0, 98, 64, 64]


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_nothing_is_drawn_for_options_that_are_off(pictures):
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert draw_use(pictures[2], 2, settings(), generator) == Use(2)
    assert torch.equal(generator.get_state(), before)


def test_half_of_the_uses_are_flipped(pictures):
    generator, options = torch.Generator().manual_seed(1), settings(flip_aug=True)
    flips = sum(draw_use(pictures[0], 0, options, generator).flipped for _ in range(400))
    assert 160 < flips < 240


def test_random_crops_reach_both_edges_and_no_further(tmp_path):
    picture_file(tmp_path / "1_face" / "a.png", (67, 64))
    [picture] = pictures_of(tmp_path)
    generator, options = torch.Generator().manual_seed(1), settings(random_crop=True)
    assert {draw_use(picture, 0, options, generator).crop for _ in range(60)} == {(0, 0), (1, 0), (2, 0), (3, 0)}


def test_colour_changes_stay_small(pictures):
    generator, options = torch.Generator().manual_seed(1), settings(color_aug=True)
    factors = torch.tensor([draw_use(pictures[0], 0, options, generator).colour for _ in range(200)])
    assert (factors - 1).abs().max() <= COLOUR_CHANGE
    assert ((factors - 1).abs().amax(0) > 0.8 * COLOUR_CHANGE).all()


def test_same_seed_draws_the_same_use(pictures):
    options = settings(flip_aug=True, random_crop=True, color_aug=True)
    first, second = (
        [draw_use(pictures[0], 0, options, torch.Generator().manual_seed(seed)) for seed in range(9)] for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 9


# --- latents ----------------------------------------------------------------------------------------------------------

EVERY_USE = [Use(index, flipped) for index in range(3) for flipped in (False, True)]


def filled(model, pictures, cache=None):
    latents = Latents(model, pictures, keep=True, cache=cache)
    latents.fill(with_flips=True, report=silent)
    return latents


def test_latents_are_encoded_once_and_told(pictures):
    model, told = TinyModel(), []
    latents = Latents(model, pictures, keep=True)
    latents.fill(with_flips=True, report=lambda *progress: told.append(progress))
    first, again = latents.batch(EVERY_USE), latents.batch(EVERY_USE)
    assert model.pictures == 6
    assert told == [(number, 6) for number in range(1, 7)]
    assert torch.equal(first, again)
    assert torch.equal(first[3:4], model.latents_of(pixels(pictures[1], Use(1, flipped=True))[None]))
    assert latents.summary() == "latents: 6 encoded"


def test_latents_that_are_not_kept_are_encoded_at_every_use(tmp_path, pictures):
    model = TinyModel()
    latents = Latents(model, pictures, keep=False, cache=DiskCache(tmp_path / "cache"))
    use = Use(1, colour=(1.0, 1.0, 1.0))
    assert torch.equal(latents.batch([use, use]), filled(TinyModel(), pictures).batch([Use(1), Use(1)]))
    assert model.pictures == 2
    assert list((tmp_path / "cache").iterdir()) == []


def test_cached_latents_are_bit_for_bit_those_that_were_encoded(tmp_path, pictures):
    wanted = filled(TinyModel(), pictures).batch(EVERY_USE)
    first = filled(TinyModel(), pictures, DiskCache(tmp_path / "cache"))
    second = filled(TinyModel(), pictures, DiskCache(tmp_path / "cache"))
    assert torch.equal(first.batch(EVERY_USE), wanted)
    assert torch.equal(second.batch(EVERY_USE), wanted)
    assert first.summary() == "latents: 0 from the cache, 6 encoded"
    assert second.summary() == "latents: 6 from the cache, 0 encoded"


def test_only_what_changed_is_encoded_again(tmp_path, pictures):
    cache = DiskCache(tmp_path / "cache")
    filled(TinyModel(), pictures, cache)
    picture_file(pictures[1].path, (64, 64), seed=9)
    fresh = filled(TinyModel(), pictures, cache)
    assert fresh.summary() == "latents: 4 from the cache, 2 encoded"
    assert torch.equal(fresh.batch(EVERY_USE), filled(TinyModel(), pictures).batch(EVERY_USE))
    picture_file(pictures[0].path.with_name("copy.png"), (64, 64), seed=9)
    moved = pictures_of(tmp_path / "data")
    assert filled(TinyModel(), moved, cache).summary() == "latents: 8 from the cache, 0 encoded"


@pytest.mark.parametrize("changes", [{"seed": 2}, {"scale": 0.25}])
def test_another_vae_or_scale_does_not_share(tmp_path, pictures, changes):
    cache = DiskCache(tmp_path / "cache")
    filled(TinyModel(), pictures, cache)
    other = filled(TinyModel(**changes), pictures, cache)
    assert other.summary() == "latents: 0 from the cache, 6 encoded"


def test_another_resolution_does_not_share(tmp_path, pictures):
    cache = DiskCache(tmp_path / "cache")
    filled(TinyModel(), pictures, cache)
    smaller = pictures_of(tmp_path / "data", resolution=32)
    assert filled(TinyModel(), smaller, cache).summary() == "latents: 0 from the cache, 6 encoded"


def test_cache_that_cannot_be_written_is_told_and_does_no_harm(tmp_path, pictures):
    cache = DiskCache(tmp_path / "cache")
    for number in range(256):
        (tmp_path / "cache" / f"{number:02x}").touch()  # where folders are wanted
    latents = filled(TinyModel(), pictures, cache)
    assert torch.equal(latents.batch(EVERY_USE), filled(TinyModel(), pictures).batch(EVERY_USE))
    assert latents.summary() == f"latents: 0 from the cache, 6 encoded. Warning: {cache.trouble}"


@pytest.mark.parametrize("find", ["fill", "check"])
def test_damaged_picture_is_named_before_training(tmp_path, find):
    picture_file(tmp_path / "1_face" / "torn.png", (64, 64))
    path = tmp_path / "1_face" / "torn.png"
    path.write_bytes(path.read_bytes()[:-99])
    latents = Latents(TinyModel(), pictures_of(tmp_path), keep=find == "fill")
    with pytest.raises(DatasetError, match=r"torn\.png is damaged; replace or remove it"):
        latents.fill(with_flips=False, report=silent) if find == "fill" else latents.check(silent)


def test_check_tells_how_far_it_is(pictures):
    told = []
    Latents(TinyModel(), pictures, keep=False).check(lambda *progress: told.append(progress))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("keep", [True, False])
def test_latents_that_are_not_finite_are_refused_by_the_name_of_the_picture(tmp_path, pictures, keep):
    latents = Latents(TinyModel(scale=float("inf")), pictures, keep=keep, cache=DiskCache(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"answers 1\.png with numbers that are not finite. Use a VAE that works"):
        latents.batch([Use(1)])


# --- captions ---------------------------------------------------------------------------------------------------------


def encoded(model, captions, cache=None):
    texts = Texts(model, keep=True, cache=cache)
    texts.fill(captions, silent)
    return texts


def same(one, other):
    return torch.equal(one.sequence, other.sequence) and torch.equal(one.pooled, other.pooled)


def test_captions_are_encoded_once_each(tmp_path):
    model, told = TinyModel(), []
    texts = Texts(model, keep=True)
    texts.fill(["b", "a", "b", ""], lambda *progress: told.append(progress))
    batch = texts.batch(["a", "b", "a"])
    assert (model.captions, told) == (3, [(1, 3), (2, 3), (3, 3)])
    assert batch.sequence.shape == (3, 8, 6)
    assert same(batch, model.encode(model.tokenize(["a", "b", "a"])))
    assert texts.summary() == "captions: 3 encoded"


def test_captions_that_change_are_encoded_at_every_use():
    model = TinyModel()
    texts = Texts(model, keep=False)
    assert same(texts.batch(["a", "b"]), texts.batch(["a", "b"]))
    assert model.captions == 4


def test_cached_captions_are_bit_for_bit_those_that_were_encoded(tmp_path):
    captions = ["a face", "a house", ""]
    wanted = encoded(TinyModel(), captions).batch(captions)
    cache = DiskCache(tmp_path)
    assert same(encoded(TinyModel(), captions, cache).batch(captions), wanted)
    second = encoded(TinyModel(), [*captions, "a tree"], cache)
    assert same(second.batch(captions), wanted)
    assert second.summary() == "captions: 3 from the cache, 1 encoded"


@pytest.mark.parametrize("changes", [{"seed": 2}, {"skipped": 1}, {"length": 9}])
def test_another_encoder_skip_or_length_does_not_share(tmp_path, changes):
    cache = DiskCache(tmp_path)
    encoded(TinyModel(), ["a", "b"], cache)
    assert encoded(TinyModel(**changes), ["a", "b"], cache).summary() == "captions: 0 from the cache, 2 encoded"


def test_embedding_that_is_not_finite_is_refused_by_its_caption():
    model = TinyModel()
    model.text_encoders[0].weight[ord("b")] = float("nan")
    with pytest.raises(ModelError, match=r"answer the caption 'ab' with numbers that are not finite"):
        encoded(model, ["a", "ab"])


# --- the real one -----------------------------------------------------------------------------------------------------


def test_shipped_model_encodes_the_same_without_into_and_out_of_a_cache(tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", str(FOLDER / "encode_cached.py"), str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    without, into, out_of = json.loads(done.stdout)
    captions = int(without[1].split()[1])
    assert without[:4] == ["latents: 6 encoded", f"captions: {captions} encoded", [6, 4, 8, 8], without[3]]
    assert into[:2] == ["latents: 0 from the cache, 6 encoded", f"captions: 0 from the cache, {captions} encoded"]
    assert out_of[:2] == ["latents: 6 from the cache, 0 encoded", f"captions: {captions} from the cache, 0 encoded"]
    assert without[2:] == into[2:] == out_of[2:]
