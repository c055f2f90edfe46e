import pytest

from runs.enums import DeviceKind, Profile
from runs.profiles import fill, repeats_for, steps_for


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
    ("images", "repeats"), [(30, (1, 4, 6)), (31, (1, 2, 6)), (60, (1, 2, 6)), (61, (1, 1, 3)), (151, (1, 1, 1))]
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
