"""Noise, targets and losses against formulas written down here in float64, from the schedule's definition on."""

import math

import numpy as np
import pytest
import torch

from lora_trainer.config import TrainingConfig
from lora_trainer.errors import ConfigError, ModelError
from lora_trainer.noise import NoiseProcess, NoisyBatch

STABLE_DIFFUSION = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
KEPT = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SNR = KEPT / (1 - KEPT)
TIMESTEPS = [0, 1, 250, 999]
PREDICTIONS = ["epsilon", "v_prediction"]
# float32 holds 1 - KEPT[0] to 1 in 14,000
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def process(prediction="epsilon", scheduler=STABLE_DIFFUSION, **options):
    return NoiseProcess(
        scheduler, prediction, TrainingConfig(pretrained_model_name_or_path="m", output_dir="o", **options)
    )


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def some(*shape, seed=1):
    return torch.randn(shape, generator=generator(seed))


LATENTS = some(4, 4, 24, 16)


def share(table, timesteps=TIMESTEPS):
    return torch.tensor(table[timesteps], dtype=torch.float32)[:, None, None, None]


def loss(prediction="epsilon", *, error, timesteps=TIMESTEPS, **options):
    target = some(*error.shape, seed=9)
    batch = NoisyBatch(target, torch.tensor(timesteps), target)
    return process(prediction, **options).loss(target + error, batch)


# --- noise and targets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_given_noise_is_mixed_in_and_the_target_follows_the_prediction(prediction):
    noise = some(*LATENTS.shape, seed=2)
    batch = process(prediction).at(LATENTS, torch.tensor(TIMESTEPS), noise)
    signal, spread = share(KEPT**0.5), share((1 - KEPT) ** 0.5)
    torch.testing.assert_close(batch.noisy, signal * LATENTS + spread * noise, **CLOSE)
    wanted = noise if prediction == "epsilon" else signal * noise - spread * LATENTS
    torch.testing.assert_close(batch.target, wanted, **CLOSE)
    assert batch.timesteps.tolist() == TIMESTEPS


def test_noisy_latents_keep_their_number_format_and_targets_are_float32():
    batch = process("v_prediction").draw(LATENTS.bfloat16(), generator())
    assert (batch.noisy.dtype, batch.target.dtype) == (torch.bfloat16, torch.float32)


def test_timesteps_are_drawn_from_the_range_without_its_end():
    drawn = process(min_timestep=200, max_timestep=205).draw(torch.zeros(500, 1, 1, 1), generator()).timesteps
    assert drawn.unique().tolist() == [200, 201, 202, 203, 204]


def test_timesteps_end_where_a_shorter_schedule_ends():
    scheduler = STABLE_DIFFUSION | {"num_train_timesteps": 3}
    drawn = process(scheduler=scheduler).draw(torch.zeros(100, 1, 1, 1), generator()).timesteps
    assert drawn.unique().tolist() == [0, 1, 2]


def test_all_randomness_comes_from_the_generator():
    options = {
        "noise_offset": 0.1,
        "noise_offset_random_strength": True,
        "adaptive_noise_scale": 0.2,
        "multires_noise_iterations": 6,
        "ip_noise_gamma": 0.1,
        "ip_noise_gamma_random_strength": True,
    }
    noise, ours = process(**options), generator()
    state = ours.get_state()
    first, after = noise.draw(LATENTS, ours), ours.get_state()
    torch.manual_seed(0)
    ours.set_state(state)
    again = noise.draw(LATENTS, ours)
    for one, two in zip(vars(first).values(), vars(again).values(), strict=True):
        assert torch.equal(one, two)
    ours.set_state(state)
    noise.draw(torch.zeros_like(LATENTS), ours)
    assert torch.equal(ours.get_state(), after)


def test_offset_is_one_draw_a_channel():
    ours = generator()
    noise = torch.randn(LATENTS.shape, generator=ours)
    wanted = noise + 0.3 * torch.randn(4, 4, 1, 1, generator=ours)
    torch.testing.assert_close(process(noise_offset=0.3).draw(LATENTS, generator()).target, wanted)


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_adaptive_offset_of_random_strength_grows_with_the_mean_and_is_never_negative(scale):
    latents = LATENTS + torch.arange(-2.0, 2.0)[None, :, None, None]
    ours = generator()
    noise = torch.randn(LATENTS.shape, generator=ours)
    strength = 0.3 * torch.rand(1, generator=ours) + scale * latents.mean((2, 3)).abs()
    strength = torch.where(strength > 0, strength, 0.0)
    wanted = noise + (strength * torch.randn(4, 4, generator=ours))[:, :, None, None]
    options = {"noise_offset": 0.3, "noise_offset_random_strength": True, "adaptive_noise_scale": scale}
    torch.testing.assert_close(process(**options).draw(latents, generator()).target, wanted)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_pyramid_noise_adds_coarser_noise_and_has_standard_deviation_one(iterations):
    ours = generator()
    wanted = torch.randn(LATENTS.shape, generator=ours)
    for level in range(iterations):
        shrink = (2 + 2 * torch.rand(1, generator=ours).item()) ** level
        height, width = max(1, int(24 / shrink)), max(1, int(16 / shrink))
        coarse = torch.randn(4, 4, height, width, generator=ours)
        wanted = wanted + 0.6**level * torch.nn.Upsample(size=(24, 16), mode="bilinear")(coarse)
        if 1 in (height, width):
            break
    options = {"multires_noise_iterations": iterations, "multires_noise_discount": 0.6}
    drawn = process(**options).draw(LATENTS, generator()).target
    torch.testing.assert_close(drawn, wanted / wanted.std())
    assert drawn.std().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("random_strength", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perturbation_goes_in_but_is_not_to_be_named(prediction, random_strength):
    options = {"ip_noise_gamma": 0.4, "ip_noise_gamma_random_strength": random_strength}
    ours = generator()
    noise = torch.randn(LATENTS.shape, generator=ours)
    timesteps = torch.randint(0, 1000, (4,), generator=ours)
    strength = 0.4 * torch.rand(1, generator=ours).item() if random_strength else 0.4
    more = strength * torch.randn(LATENTS.shape, generator=ours)
    batch, plain = process(prediction, **options).draw(LATENTS, generator()), process(prediction)
    assert torch.equal(batch.timesteps, timesteps)
    torch.testing.assert_close(batch.noisy, plain.at(LATENTS, timesteps, noise + more).noisy)
    assert torch.equal(batch.target, plain.at(LATENTS, timesteps, noise).target)


# --- losses -----------------------------------------------------------------------------------------------------------


def huber_threshold(schedule, timestep, c, scale):
    if schedule == "constant":
        return c * scale
    if schedule == "exponential":
        return math.exp(math.log(c) * timestep / 1000) * scale
    sigma = math.sqrt(1 / SNR[timestep])
    return (1 - c) / (1 + sigma) ** 2 + c


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("kind", ["l1", "l2", "huber", "smooth_l1"])
def test_loss_is_the_mean_of_the_distance_over_each_picture(kind, schedule):
    error = some(4, 4, 6, 8, seed=3) * torch.tensor([0.01, 0.1, 1, 10])[:, None, None, None]
    got = loss(error=error, loss_type=kind, huber_schedule=schedule, huber_c=0.2, huber_scale=1.5)
    for picture, timestep in enumerate(TIMESTEPS):
        e, c = error[picture].double().numpy(), huber_threshold(schedule, timestep, 0.2, 1.5)
        pseudo_huber = np.sqrt(e**2 + c**2) - c
        wanted = {"l1": abs(e), "l2": e**2, "huber": 2 * c * pseudo_huber, "smooth_l1": 2 * pseudo_huber}[kind].mean()
        # the root is taken in float32, where a small error drowns in c
        assert got[picture].item() == pytest.approx(wanted, rel=3e-4, abs=1e-6)


def test_loss_is_float32_for_answers_in_half_precision():
    answer = some(4, 4, 6, 8).bfloat16()
    batch = NoisyBatch(answer, torch.tensor(TIMESTEPS), torch.zeros(4, 4, 6, 8))
    wanted = answer.float().square().mean((1, 2, 3))
    got = process().loss(answer, batch)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted)


def min_snr(snr, is_noise):
    return min(snr, 5) / (snr if is_noise else snr + 1)


def like_noise(snr):
    return min(snr, 1000) / (min(snr, 1000) + 1)


def debiased(snr, is_noise):
    return 1 / math.sqrt(min(snr, 1000)) if is_noise else 1 / (min(snr, 1000) + 1)


WEIGHTS = [
    ("epsilon", {}, lambda snr: 1),
    ("epsilon", {"min_snr_gamma": 5}, lambda snr: min_snr(snr, is_noise=True)),
    ("epsilon", {"v_pred_like_loss": 0.3}, lambda snr: 1 + 0.3 / like_noise(snr)),
    ("epsilon", {"debiased_estimation_loss": True}, lambda snr: debiased(snr, is_noise=True)),
    (
        "epsilon",
        {"min_snr_gamma": 5, "v_pred_like_loss": 0.3, "debiased_estimation_loss": True},
        lambda snr: min_snr(snr, is_noise=True) * (1 + 0.3 / like_noise(snr)) * debiased(snr, is_noise=True),
    ),
    ("v_prediction", {}, lambda snr: 1),
    ("v_prediction", {"min_snr_gamma": 5}, lambda snr: min_snr(snr, is_noise=False)),
    ("v_prediction", {"scale_v_pred_loss_like_noise_pred": True}, like_noise),
    ("v_prediction", {"debiased_estimation_loss": True}, lambda snr: debiased(snr, is_noise=False)),
    (
        "v_prediction",
        {"min_snr_gamma": 5, "scale_v_pred_loss_like_noise_pred": True, "debiased_estimation_loss": True},
        lambda snr: min_snr(snr, is_noise=False) * like_noise(snr) * debiased(snr, is_noise=False),
    ),
]


@pytest.mark.parametrize(("prediction", "options", "weight"), WEIGHTS)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_weights_follow_the_snr_before_any_rescaling(prediction, options, weight, zero_terminal_snr):
    error = torch.full((1000, 1, 1, 1), 2.0)
    got = loss(prediction, error=error, timesteps=list(range(1000)), zero_terminal_snr=zero_terminal_snr, **options)
    wanted = torch.tensor([4 * weight(snr) for snr in SNR], dtype=torch.float32)
    torch.testing.assert_close(got, wanted, **CLOSE)


# --- zero terminal SNR ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"zero_terminal_snr": True}, {"scheduler": {"rescale_betas_zero_snr": True}}])
def test_rescaled_schedule_ends_with_pure_noise(how):
    how = how | {"scheduler": STABLE_DIFFUSION | how.get("scheduler", {})}
    root = KEPT**0.5
    rescaled = (root - root[-1]) * root[0] / (root[0] - root[-1])
    noise = some(*LATENTS.shape, seed=2)
    batch = process("v_prediction", **how).at(LATENTS, torch.tensor(TIMESTEPS), noise)
    wanted = share(rescaled) * LATENTS + share((1 - rescaled**2) ** 0.5) * noise
    torch.testing.assert_close(batch.noisy, wanted, **CLOSE)
    assert torch.equal(batch.noisy[-1], noise[-1])
    assert torch.equal(batch.target[-1], -LATENTS[-1])


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber_threshold_is_finite_where_nothing_is_kept(kind):
    error = torch.full((1, 1, 1, 1), 3.0)
    got = loss(error=error, timesteps=[999], loss_type=kind, zero_terminal_snr=True, huber_c=0.5)
    assert got.item() == pytest.approx((1 if kind == "huber" else 2) * (math.sqrt(9.25) - 0.5))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_other_predictions_are_refused():
    with pytest.raises(ModelError) as refusal:
        process("sample")
    assert str(refusal.value) == ("The base model predicts 'sample'; only epsilon and v_prediction can be trained.")


@pytest.mark.parametrize(
    ("prediction", "options", "sentence"),
    [
        (
            "epsilon",
            {"scale_v_pred_loss_like_noise_pred": True},
            "'scale_v_pred_loss_like_noise_pred' is for v-prediction, and the base model predicts noise.",
        ),
        (
            "v_prediction",
            {"v_pred_like_loss": 0.1},
            "'v_pred_like_loss' is for models that predict noise, and the base model predicts velocity.",
        ),
    ],
)
def test_weights_for_the_other_prediction_are_refused(prediction, options, sentence):
    with pytest.raises(ConfigError) as refusal:
        process(prediction, **options)
    assert str(refusal.value) == sentence
