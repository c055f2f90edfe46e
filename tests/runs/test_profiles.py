import pytest

from runs.enums import DeviceKind, Profile
from runs.profiles import BASE, PROFILES, fill, repeats_for, steps_for
from runs.stacks.kohya import KohyaStack
from runs.trainpilot import DEFAULT


@pytest.mark.parametrize(
    ("images", "steps"),
    [
        (5, (36, 125, 360)),
        (20, (120, 500, 1350)),
        (60, (360, 750, 2400)),
        (61, (372, 400, 2070)),
        (81, (492, 525, 2745)),
        (150, (800, 950, 3200)),
        (301, (800, 1600, 3200)),
    ],
)
def test_steps_follow_the_documented_rule(images, steps):
    assert tuple(steps_for(profile, images) for profile in Profile) == steps


@pytest.mark.parametrize(
    ("profile", "target", "epochs"), [("quick_test", 600, 12), ("regular", 1200, 25), ("high_quality", 2400, 45)]
)
def test_target_and_most_epochs_are_the_documented_ones(profile, target, epochs):
    numbers = PROFILES[Profile(profile)]
    assert (numbers.target_steps, numbers.most_epochs) == (target, epochs)


@pytest.mark.parametrize(("images", "targets"), [(80, (600, 1200, 2400)), (81, (800, 1600, 3200))])
def test_target_grows_by_a_third_above_80_images(monkeypatch, images, targets):
    monkeypatch.setattr("runs.profiles.updates_per_epoch", lambda *_, **__: 10**6)  # so that epochs do not bound it
    assert tuple(steps_for(profile, images) for profile in Profile) == targets


@pytest.mark.parametrize(
    ("images", "repeats"),
    [
        (1, (1, 4, 6)),
        (30, (1, 4, 6)),
        (31, (1, 2, 6)),
        (60, (1, 2, 6)),
        (61, (1, 1, 3)),
        (150, (1, 1, 3)),
        (151, (1, 1, 1)),
    ],
)
def test_repeats_follow_the_documented_rule(images, repeats):
    assert tuple(repeats_for(profile, images) for profile in Profile) == repeats


@pytest.mark.parametrize(
    ("profile", "rank", "alpha", "batch", "accumulation", "precision"),
    [("quick_test", 32, 16, 1, 2, "fp16"), ("regular", 48, 24, 2, 2, "bf16"), ("high_quality", 64, 32, 4, 1, "bf16")],
)
def test_profile_has_the_documented_numbers(profile, rank, alpha, batch, accumulation, precision):
    values = fill(Profile(profile), images=20, resolution=1024, device=DeviceKind.CUDA, model_name="SDXL").values
    names = ("rank", "conv_rank", "alpha", "conv_alpha", "batch_size", "gradient_accumulation_steps", "precision")
    assert [values[name] for name in names] == [rank, rank, alpha, alpha, batch, accumulation, precision]
    assert (values["learning_rate"], values["network_dropout"], values["min_snr_gamma"]) == (2.5e-4, 0.05, 5.0)


@pytest.mark.parametrize(
    ("profile", "tokens", "rate"), [("quick_test", 150, 2e-5), ("regular", 225, 3e-5), ("high_quality", 225, 3e-5)]
)
def test_profile_trains_the_text_encoders_on_long_captions(profile, tokens, rate):
    filled = fill(Profile(profile), images=20, resolution=1024, device=DeviceKind.CUDA, model_name="SDXL")
    assert (filled.values["caption_tokens"], filled.values["text_encoder_learning_rate"]) == (tokens, rate)
    assert filled.notes == []


def test_profile_follows_the_model_and_the_device_and_says_so():
    filled = fill(Profile.REGULAR, images=20, resolution=128, device=DeviceKind.CPU, model_name="pilot-tiny")
    assert (filled.values["resolution"], filled.values["precision"]) == (128, "fp32")
    assert filled.notes[0].startswith("Precision fp32 instead of bf16")
    assert filled.notes[1] == "Resolution 128 instead of 1024: pilot-tiny was made for 128 pixels."


def test_warm_up_is_the_documented_one_and_never_more_than_a_tenth():
    filled = [
        fill(Profile.REGULAR, images=images, resolution=1024, device=DeviceKind.CUDA, model_name="SDXL")
        for images in (5, 60)
    ]
    assert [(one.values["steps"], one.values["warmup_steps"]) for one in filled] == [(125, 12), (750, 75)]
    many = fill(Profile.HIGH_QUALITY, images=60, resolution=1024, device=DeviceKind.CUDA, model_name="SDXL")
    assert (many.values["steps"], many.values["warmup_steps"]) == (2400, 100)


def test_the_base_configuration_says_what_the_profiles_build_on():
    read = KohyaStack().read_config(DEFAULT)
    assert {name: value for name, value in read.values.items() if name in BASE} == BASE
    assert read.options == {
        "min_bucket_reso": 768,
        "max_bucket_reso": 1600,
        "bucket_reso_steps": 64,
        "optimizer_args": ["betas=0.9,0.99"],
    }
    assert (read.values["gradient_checkpointing"], read.notes) == (True, [])


def test_a_profile_keeps_what_it_does_not_set_and_sets_the_rest():
    own = KohyaStack().read_config("noise_offset = 0.1\nnetwork_dim = 4\nmax_train_epochs = 3\nmin_bucket_reso = 512\n")
    filled = fill(Profile.QUICK_TEST, images=20, resolution=1024, device=DeviceKind.CUDA, model_name="SDXL", base=own)
    assert (filled.values["noise_offset"], filled.values["rank"], filled.values["steps"]) == (0.1, 32, 120)
    assert filled.options == {"min_bucket_reso": 512}


@pytest.mark.parametrize(("warmup", "steps"), [("0.05", 6), ("0.5", 12), ("5", 5), ("500", 12)])
def test_warm_up_of_the_base_may_be_a_share_and_is_a_tenth_at_most(warmup, steps):
    own = KohyaStack().read_config(f"lr_warmup_steps = {warmup}\n")
    filled = fill(Profile.QUICK_TEST, images=20, resolution=1024, device=DeviceKind.CUDA, model_name="SDXL", base=own)
    assert (filled.values["steps"], filled.values["warmup_steps"]) == (120, steps)
