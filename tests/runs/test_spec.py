import pytest

from lorapilot.errors import UserError
from runs.spec import RunSpec


def test_spec_survives_the_trip_through_json():
    spec = RunSpec.from_values({"steps": "320", "learning_rate": "4e-3", "sample_prompts": "one\n\n two "})
    assert spec.sample_prompts == ("one", "two")
    assert spec.steps == 320
    assert RunSpec.from_values(spec.as_values()) == spec


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"stps": 3}, "stps", "There is no setting 'stps'. Did you mean steps?"),
        ({"steps": 0}, "steps", "Steps must be at least 1."),
        ({"steps": 3.5}, "steps", "Steps is a whole number."),
        ({"steps": True}, "steps", "Steps is a whole number."),
        ({"learning_rate": "nan"}, "learning_rate", "Learning rate is a finite number."),
        ({"learning_rate": 0}, "learning_rate", "Learning rate must be more than 0."),
        ({"resolution": 100}, "resolution", "Resolution must be a multiple of 8."),
        ({"flip": 1}, "flip", "Mirror at random is true or false."),
        ({"precision": "fp8"}, "precision", "Precision: 'fp8' is none of fp32, fp16, bf16."),
        ({"steps": 10, "warmup_steps": 10}, "warmup_steps", "Warm-up is 10 of 10 steps: use fewer."),
        ({"caption_tokens": 100}, "caption_tokens", "Caption tokens must be a multiple of 75."),
        (
            {"optimizer": "Adam"},
            "optimizer",
            "Optimizer: 'Adam' is none of AdamW, AdamW8bit, Lion, Adafactor, Prodigy, AdamWScheduleFree.",
        ),
        ({"save_best": True}, "save_best", "Keep the best needs validation pictures: set a validation share."),
        ({"sample_prompts": ["x"] * 17}, "sample_prompts", "At most 16 sample prompts, please."),
        ({"sample_prompts": [1]}, "sample_prompts", "Sample prompts is a list of texts."),
    ],
)
def test_spec_refuses_what_cannot_be(values, field, message):
    with pytest.raises(UserError) as refused:
        RunSpec.from_values(values)
    assert (refused.value.field, refused.value.message) == (field, message)
