import io

import pytest
import torch

from lora_trainer.ema import Ema


def weights(count=2, seed=1):
    torch.manual_seed(seed)
    return [torch.randn(3, 4, requires_grad=True) for _ in range(count)]


@torch.no_grad()
def change(parameters):
    for one in parameters:
        one.add_(torch.randn(3, 4) / 7)


def step(ema, parameters):
    change(parameters)
    ema.update()


def values(parameters):
    return [one.detach().clone() for one in parameters]


def averages(ema, parameters):
    with ema.applied():
        return values(parameters)


def test_mean_follows_the_formula_with_its_warm_up():
    parameters = weights()
    ema = Ema(parameters, 0.5)
    wanted = [one.double() for one in values(parameters)]
    # 0.1 and 2/11 … are below 0.5 up to n = 7; then 9/18 and the decay itself
    for count in range(12):
        step(ema, parameters)
        decay = min(0.5, (1 + count) / (10 + count))
        wanted = [decay * mean + (1 - decay) * one.double() for mean, one in zip(wanted, parameters, strict=True)]
    for got, one in zip(averages(ema, parameters), wanted, strict=True):
        torch.testing.assert_close(got.double(), one, rtol=0, atol=1e-6)


def test_applied_gives_the_exact_bits_back_even_after_an_error():
    parameters = weights()
    ema = Ema(parameters, 0.999)
    for _ in range(3):
        step(ema, parameters)
    before = values(parameters)

    def fail():
        with ema.applied():
            assert not torch.equal(parameters[0], before[0])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(map(torch.equal, parameters, before))
    assert all(one.requires_grad and one.is_leaf for one in parameters)


def test_state_goes_through_a_file_exactly():
    parameters = weights()
    ema = Ema(parameters, 0.9)
    for _ in range(4):
        step(ema, parameters)
    file = io.BytesIO()
    torch.save({"ema": ema.state_dict(), "weights": values(parameters)}, file)
    random = torch.get_rng_state()
    step(ema, parameters)
    wanted = averages(ema, parameters)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [one.requires_grad_() for one in saved["weights"]]
    again = Ema(resumed, 0.9)
    again.load_state_dict(saved["ema"])
    torch.set_rng_state(random)
    step(again, resumed)
    assert all(map(torch.equal, averages(again, resumed), wanted))


def test_state_dict_does_not_change_with_later_steps():
    parameters = weights()
    ema = Ema(parameters, 0.9)
    state = ema.state_dict()
    kept = values(state["means"])
    step(ema, parameters)
    assert all(map(torch.equal, state["means"], kept))
    assert state["updates"] == 0


def test_half_precision_weights_are_averaged_in_float32():
    parameters = [one.detach().bfloat16() for one in weights(count=1)]
    ema = Ema(parameters, 0.9)
    ema.update()
    (mean,) = ema.state_dict()["means"]
    assert mean.dtype == torch.float32


def test_state_of_other_weights_is_refused():
    with pytest.raises(ValueError, match="belongs to another LoRA"):
        Ema(weights(), 0.9).load_state_dict(Ema(weights(count=3), 0.9).state_dict())
