"""Expected texts are worked out by hand from sd-scripts' rules; random choices are scripted."""

import pytest

from lora_trainer import config
from lora_trainer.captions import CaptionRules


class Scripted:
    """Gives these numbers and permutations, and fails when too many are wanted."""

    def __init__(self, *numbers, order=None):
        self.numbers = list(numbers)
        self.order = order

    def uniform(self):
        return self.numbers.pop(0)

    def permutation(self, count):
        assert sorted(self.order) == list(range(count))
        return self.order


def rules(**options):
    return CaptionRules(**options)


def test_rules_come_from_the_options():
    table = {
        "caption_prefix": "a", "caption_suffix": "b", "caption_separator": ";", "shuffle_caption": True,
        "keep_tokens": 1, "keep_tokens_separator": "|||", "caption_dropout_rate": 0.1,
        "caption_dropout_every_n_epochs": 2, "caption_tag_dropout_rate": 0.3,
    }  # fmt: skip
    needed = {"pretrained_model_name_or_path": "m", "output_dir": "o", "dataset_manifest": "d"}
    assert CaptionRules.from_config(config.from_table(needed | table)) == rules(
        prefix="a", suffix="b", separator=";", shuffle=True, keep_tokens=1, keep_tokens_separator="|||",
        dropout_rate=0.1, dropout_every_n_epochs=2, tag_dropout_rate=0.3,
    )  # fmt: skip


def test_caption_is_left_as_it_is_unless_an_option_says_otherwise():
    for caption in ("a face", "", "a,b ,, c", "a ||| b"):
        assert rules(keep_tokens=1, keep_tokens_separator="|||").caption_for(caption, 0, Scripted()) == caption


def test_prefix_and_suffix_are_set_off_by_a_space():
    both = rules(prefix="photo,", suffix="end")
    assert both.caption_for("a face", 0, Scripted()) == "photo, a face end"
    assert both.caption_for("", 0, Scripted()) == "photo,  end"


def test_tags_are_shuffled_and_joined_by_a_comma():
    shuffled = rules(shuffle=True)
    assert shuffled.caption_for("a,b , c", 0, Scripted(order=[2, 0, 1])) == "c, a, b"
    assert rules(shuffle=True, separator=";").caption_for("a, b; c", 0, Scripted(order=[1, 0])) == "c, a, b"


def test_empty_tags_stay_without_a_mark_and_go_with_one():
    assert rules(shuffle=True).caption_for("a,, b", 0, Scripted(order=[1, 2, 0])) == ", b, a"
    marked = rules(shuffle=True, keep_tokens_separator="|")
    assert marked.caption_for("a,, b | c,, d", 0, Scripted(order=[1, 0])) == "a, b, d, c"


def test_first_tags_are_kept_prefix_included():
    kept = rules(shuffle=True, keep_tokens=2)
    assert kept.caption_for("a, b, c, d", 0, Scripted(order=[1, 0])) == "a, b, d, c"
    framed = rules(shuffle=True, keep_tokens=1, prefix="x,", suffix="z")
    assert framed.caption_for("a, b", 0, Scripted(order=[1, 0])) == "x, b z, a"
    assert kept.caption_for("a", 0, Scripted(order=[])) == "a"


def test_tags_before_the_mark_and_behind_the_second_one_are_kept():
    marked = rules(shuffle=True, keep_tokens=3, keep_tokens_separator="|||")
    assert marked.caption_for("a, b ||| c, d ||| e, f", 0, Scripted(order=[1, 0])) == "a, b, d, c, e, f"
    assert marked.caption_for("a ||| b, c", 0, Scripted(order=[1, 0])) == "a, c, b"
    # without a mark keep_tokens counts
    assert marked.caption_for("a, b, c, d, e", 0, Scripted(order=[1, 0])) == "a, b, c, e, d"


def test_tags_are_dropped_after_shuffling_and_kept_ones_never():
    dropped = rules(shuffle=True, keep_tokens=1, tag_dropout_rate=0.5)
    assert dropped.caption_for("a, b, c, d", 0, Scripted(0.4, 0.5, 0.6, order=[2, 0, 1])) == "a, b, c"
    assert rules(tag_dropout_rate=0.5).caption_for("a, b, c", 0, Scripted(0.9, 0.1, 0.9)) == "a, c"
    assert rules(tag_dropout_rate=1.0).caption_for("a, b", 0, Scripted(0.9, 0.9)) == ""


def test_whole_caption_is_dropped_with_prefix_and_suffix():
    dropped = rules(dropout_rate=0.3, prefix="x", suffix="y", shuffle=True, keep_tokens=1)
    assert dropped.caption_for("a, b", 0, Scripted(0.29)) == ""
    assert dropped.caption_for("a, b", 0, Scripted(0.3, order=[0])) == "x a, b y"


@pytest.mark.parametrize(("every", "empty"), [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [2, 5]), (0, [])])
def test_captions_of_every_nth_epoch_are_empty(every, empty):
    found = [epoch for epoch in range(6) if not rules(dropout_every_n_epochs=every).caption_for("a", epoch, Scripted())]
    assert found == empty


def test_possible_captions_are_all_that_uses_can_have():
    captions = ["b", "a", "b"]
    assert rules(prefix="x").possible_captions(captions) == ["x a", "x b"]
    assert rules(dropout_rate=0.1).possible_captions(captions) == ["", "a", "b"]
    assert rules(dropout_every_n_epochs=3).possible_captions(captions) == ["", "a", "b"]
    assert rules(shuffle=True).possible_captions(captions) is None
    assert rules(tag_dropout_rate=0.1).possible_captions(captions) is None


def test_plain_caption_has_every_tag_in_order():
    assert rules(prefix="x", dropout_rate=1.0).plain("a,b") == "x a,b"
    marked = rules(shuffle=True, tag_dropout_rate=0.9, keep_tokens_separator="|||")
    assert marked.plain("a ||| b,c ||| d") == "a, b, c, d"
