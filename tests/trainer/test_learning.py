"""A LoRA learns what its pictures show. `make learn` has more concepts and seeds, the full recipe, and a control for
each, which learns nothing from other pictures."""

from benchmarks.learning import CONCEPTS, Recipe, learn

SHORT = Recipe(steps=100, batch=4, sample_steps=10, prompts=4)


def test_samples_come_near_held_out_pictures_of_the_concept(tmp_path):
    # over three seeds 0.53 to 0.62; without the concept's pictures 0.98 to 1.00
    result = learn(CONCEPTS["face"], SHORT, seed=0, folder=tmp_path)
    assert result.ratio <= 0.75, result
