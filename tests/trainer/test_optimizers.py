"""Every optimizer on a small factorisation: what sd-scripts' options mean, and that a resumed run is the same run."""

import io
import sys
import types

import lion_pytorch
import prodigyopt
import pytest
import schedulefree
import torch
import transformers

from lora_trainer.config import OPTIMIZERS, TrainingConfig, from_table
from lora_trainer.errors import ConfigError
from lora_trainer.optimizers import effective_rate, evaluation_weights, make_optimizer

CPU = torch.device("cpu")
RATES = {"SGD": 3.0, "SGDNesterov": 3.0, "Lion": 0.01, "Adafactor": 0.3, "Prodigy": 1.0}
VARIANTS = [
    ("AdamW", ()),
    ("AdamW8bit", ()),
    ("SGD", ("momentum=0.8", "weight_decay=0.001")),
    ("SGDNesterov", ()),
    ("Lion", ("weight_decay=0.01", "betas=0.95,0.98")),
    ("Adafactor", ()),
    ("Adafactor", ("scale_parameter=False", "clip_threshold=2.0", "weight_decay=0.01")),
    ("Prodigy", ()),
    ("Prodigy", ("d_coef=2", "use_bias_correction=True", "safeguard_warmup=True", "slice_p=3", "d0=0.01")),
    ("AdamWScheduleFree", ()),
    ("AdamWScheduleFree", ("warmup_steps=3", "r=1.0", "weight_decay=0.02", "betas=0.95,0.99")),
]


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads for so little work mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Training:
    """Learns two products up @ down of rank 4, as a LoRA does: `up` starts at 0. The rate falls and starts at 0."""

    def __init__(self, name, arguments=(), **options):
        if name == "AdamW8bit":
            pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        random = torch.Generator().manual_seed(3)
        # bitsandbytes keeps 8 bits of tensors from 4096 numbers on
        width = 1024 if name == "AdamW8bit" else 64
        self.downs = [(torch.randn(4, width, generator=random) / 4).requires_grad_() for _ in range(2)]
        self.ups = [torch.zeros(width, 4, requires_grad=True) for _ in range(2)]
        self.wanted = [torch.randn(width, 4, generator=random) @ one.detach() for one in self.downs]
        self.rate = RATES.get(name, 0.02)
        self.steps = 0
        config = TrainingConfig(
            pretrained_model_name_or_path="m",
            output_dir="o",
            optimizer_type=name,
            optimizer_args=arguments,
            learning_rate=self.rate,
            **options,
        )
        groups = [{"params": list(pair), "lr": self.rate} for pair in zip(self.downs, self.ups, strict=True)]
        self.optimizer = make_optimizer(config, groups, CPU)

    @property
    def parameters(self):
        return [*self.downs, *self.ups]

    def loss(self):
        parts = zip(self.ups, self.downs, self.wanted, strict=True)
        return sum((up @ down - wanted).square().mean() for up, down, wanted in parts)

    def run(self, steps):
        for _ in range(steps):
            factor = 0.0 if self.steps == 0 else 1 - self.steps / 40
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * factor
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
            self.steps += 1
        return self

    def values(self):
        return [one.detach().clone() for one in self.parameters]

    def save(self):
        file = io.BytesIO()
        torch.save({"weights": self.values(), "optimizer": self.optimizer.state_dict(), "steps": self.steps}, file)
        file.seek(0)
        return file

    @torch.no_grad()
    def load(self, file):
        saved = torch.load(file, map_location="cpu", weights_only=True)
        for one, value in zip(self.parameters, saved["weights"], strict=True):
            one.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.steps = saved["steps"]
        return self


def assert_equal_bits(some, others):
    assert all(map(torch.equal, some, others))


def make(name, *arguments, device=CPU, **options):
    config = TrainingConfig(
        pretrained_model_name_or_path="m", output_dir="o", optimizer_type=name, optimizer_args=arguments, **options
    )
    return make_optimizer(config, [{"params": [torch.zeros(2, 2, requires_grad=True)], "lr": 0.5}], device)


def facts(optimizer, *names):
    (group,) = optimizer.param_groups
    return {name: group[name] for name in names}


# --- which optimizer --------------------------------------------------------------------------------------------------


def test_there_is_a_variant_for_every_optimizer():
    assert {name for name, _ in VARIANTS} == set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("name", "kind", "defaults"),
    [
        ("AdamW", torch.optim.AdamW, {"fused": True, "weight_decay": 0.01, "betas": (0.9, 0.999)}),
        ("SGD", torch.optim.SGD, {"momentum": 0, "nesterov": False}),
        ("SGDNesterov", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("Lion", lion_pytorch.Lion, {"weight_decay": 0.0, "betas": (0.9, 0.99)}),
        ("Adafactor", transformers.optimization.Adafactor, {"relative_step": False, "scale_parameter": True}),
        ("Prodigy", prodigyopt.Prodigy, {"d0": 1e-6, "decouple": True, "weight_decay": 0}),
        ("AdamWScheduleFree", schedulefree.AdamWScheduleFree, {"warmup_steps": 0, "train_mode": True}),
    ],
)
def test_optimizer_is_the_library_class_with_sd_scripts_defaults(name, kind, defaults):
    optimizer = make(name)
    assert type(optimizer) is kind
    assert facts(optimizer, "lr", *defaults) == {"lr": 0.5, **defaults}


@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [
        ("AdamW", ("weight_decay=0.1", "betas=0.8,0.99", "eps=1e-6"), {"weight_decay": 0.1, "eps": 1e-6}),
        ("SGDNesterov", ("momentum=0.7",), {"momentum": 0.7, "nesterov": True}),
        ("Adafactor", ("scale_parameter=False", "decay_rate=-0.7"), {"scale_parameter": False, "decay_rate": -0.7}),
        ("Prodigy", ("d_coef=2", "safeguard_warmup=True"), {"d_coef": 2.0, "safeguard_warmup": True}),
        ("AdamWScheduleFree", ("warmup_steps=10", "r=1"), {"warmup_steps": 10, "r": 1.0}),
    ],
)
def test_arguments_reach_the_optimizer(name, arguments, wanted):
    assert facts(make(name, *arguments), *wanted) == wanted


def test_arguments_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError) as refusal:
        make("SGDNesterov", "momentum=0")
    assert str(refusal.value) == (
        "'optimizer_args' does not suit SGDNesterov: Nesterov momentum requires a momentum and zero dampening."
    )


# --- what it does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_optimizer_learns(name, arguments):
    training = Training(name, arguments)
    before = training.loss().item()
    assert training.run(25).loss().item() < 0.9 * before


@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_resumed_training_is_the_same_bit_for_bit(name, arguments, steps_before):
    whole = Training(name, arguments).run(8)
    stopped = Training(name, arguments).run(steps_before)
    resumed = Training(name, arguments).load(stopped.save()).run(8 - steps_before)
    assert_equal_bits(resumed.values(), whole.values())
    assert effective_rate(resumed.optimizer) == effective_rate(whole.optimizer)


def test_state_of_another_number_of_groups_is_refused():
    with pytest.raises(ValueError, match="different number of parameter groups"):
        make("AdamW").load_state_dict(Training("AdamW").optimizer.state_dict())


def test_effective_rate_is_the_first_groups():
    training = Training("AdamW").run(11)
    assert effective_rate(training.optimizer) == pytest.approx(0.02 * 0.75)


def test_effective_rate_of_prodigy_includes_its_own_estimate():
    training = Training("Prodigy").run(11)
    estimate = training.optimizer.param_groups[0]["d"]
    assert estimate > 1e-6
    assert effective_rate(training.optimizer) == pytest.approx(0.75 * estimate)


# --- schedule-free ----------------------------------------------------------------------------------------------------


def test_evaluation_weights_are_the_mean_of_the_steps_of_a_constant_rate():
    training = Training("AdamWScheduleFree").run(1)  # its rate is 0: it weighs nothing
    iterates = []
    for _ in range(6):
        training.steps = 1
        training.run(1)
        iterates.append([training.optimizer.state[one]["z"].double() for one in training.parameters])
    with evaluation_weights(training.optimizer):
        inside = training.values()
    for index, got in enumerate(inside):
        wanted = torch.stack([iterate[index] for iterate in iterates]).mean(0)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-6)


def test_evaluation_leaves_no_trace_in_the_training():
    plain = Training("AdamWScheduleFree").run(6)
    evaluated = Training("AdamWScheduleFree")
    for _ in range(6):
        with evaluation_weights(evaluated.optimizer), evaluation_weights(evaluated.optimizer):
            pass
        evaluated.run(1)
    assert_equal_bits(evaluated.values(), plain.values())


def test_training_weights_come_back_after_an_error():
    training = Training("AdamWScheduleFree").run(4)
    before = training.values()

    def fail():
        with evaluation_weights(training.optimizer):
            assert not torch.equal(training.values()[0], before[0])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert_equal_bits(training.values(), before)
    assert [group["train_mode"] for group in training.optimizer.param_groups] == [True, True]


def test_other_optimizers_are_evaluated_as_they_are():
    training = Training("Prodigy").run(3)
    before = training.values()
    with evaluation_weights(training.optimizer):
        assert_equal_bits(training.values(), before)


# --- AdamW8bit --------------------------------------------------------------------------------------------------------


def test_eight_bit_adamw_without_its_package_says_what_to_install(monkeypatch):
    for module in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as refusal:
        make("AdamW8bit")
    assert str(refusal.value) == (
        "'optimizer_type' = 'AdamW8bit' needs the package bitsandbytes. "
        "Install it (pip install bitsandbytes), or use 'AdamW'."
    )


def test_eight_bit_adamw_without_a_kernel_for_the_device_says_what_to_use(monkeypatch):
    class WithoutKernels(torch.optim.AdamW):
        def step(self):
            raise NotImplementedError("no kernel\nand much more")

    package = types.ModuleType("bitsandbytes.optim")
    package.AdamW8bit = WithoutKernels
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package)
    with pytest.raises(ConfigError) as refusal:
        make("AdamW8bit")
    assert str(refusal.value) == (
        "'optimizer_type' = 'AdamW8bit' does not work on this machine's cpu (no kernel). Use 'AdamW'."
    )


# --- options that do not go together ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "cosine"},
            (
                "'optimizer_type' = 'AdamWScheduleFree' works without a schedule: "
                "'lr_scheduler' must be constant or constant_with_warmup, not 'cosine'."
            ),
        ),
        (
            {"optimizer_type": "AdamWScheduleFree", "ema_decay": 0.999},
            "'optimizer_type' = 'AdamWScheduleFree' averages the weights itself: leave out 'ema_decay'.",
        ),
        (
            {"optimizer_type": "AdamWScheduleFree", "optimizer_args": ["betas=0,0.99"]},
            "'optimizer_args': the betas of AdamWScheduleFree must be above 0.",
        ),
        (
            {"optimizer_type": "Prodigy", "learning_rate": 1, "text_encoder_lr": 0.5},
            "'optimizer_type' = 'Prodigy' takes one learning rate: 'unet_lr' and 'text_encoder_lr' differ.",
        ),
        ({"adaptive_noise_scale": 0.1}, "'adaptive_noise_scale' needs 'noise_offset'."),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, sentence):
    table = {"pretrained_model_name_or_path": "m", "output_dir": "o", "dataset_manifest": "d"}
    with pytest.raises(ConfigError) as refusal:
        from_table(table | options)
    assert str(refusal.value) == sentence


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 10},
        {"optimizer_type": "Prodigy", "learning_rate": 1, "text_encoder_lr": 0},
        {"optimizer_type": "Prodigy", "unet_lr": 1.0, "network_train_unet_only": True},
    ],
)
def test_options_that_go_together_are_taken(options):
    table = {"pretrained_model_name_or_path": "m", "output_dir": "o", "dataset_manifest": "d"}
    assert from_table(table | options).optimizer_type == options["optimizer_type"]
