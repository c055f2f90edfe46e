"""What an edit of many captions makes of each; a hostile pattern ends nothing but its own process."""

from __future__ import annotations

import pytest

from datasets.caption_operations import Operation, apply, checked, has_word
from lorapilot.errors import UserError

SLOW = "The pattern takes too long or too much memory. Make it simpler, or select fewer pictures."


@pytest.mark.parametrize(
    ("operation", "before", "after"),
    [
        (Operation("add", "red, blue"), "a cat,Red", "a cat,Red, blue"),
        (Operation("add", "red, red, ,blue"), "", "red, blue"),
        (Operation("add", "red", at_start=True), "a cat, asleep", "red, a cat, asleep"),
        (Operation("add", "red"), "a  cat ,  red", "a  cat ,  red"),
        (Operation("add", "red"), "a cat,", "a cat, red"),
        (Operation("remove", "RED, gone"), "red, a cat,red ,  big", "a cat, big"),
        (Operation("remove", "cat"), "a cat,  asleep", "a cat,  asleep"),
        (Operation("remove", "cat"), "cat", ""),
        (Operation("rename", "cat", "dog"), "big, Cat, red", "big, dog, red"),
        (Operation("rename", "cat", "dog"), "cat, red, Dog", "dog, red"),
        (Operation("rename", "cat", ""), "big, cat, red", "big, red"),
        (Operation("rename", "cat", "dog"), "a cat,  asleep", "a cat,  asleep"),
        (Operation("replace", "cat", "dog"), "a cat, catalog", "a dog, dogalog"),
        (Operation("replace", " ", "_"), "a cat", "a_cat"),
        (Operation("replace", "a cat", ""), "a cat, asleep", ", asleep"),
        (Operation("prefix", "a photo of"), "a cat", "a photo of a cat"),
        (Operation("prefix", "a photo of "), "a photo of a cat", "a photo of a cat"),
        (Operation("prefix", "a photo, "), "", "a photo,"),
        (Operation("suffix", ", high quality"), "a cat", "a cat, high quality"),
        (Operation("suffix", "asleep"), "a cat", "a cat asleep"),
        (Operation("suffix", "asleep"), "a cat asleep", "a cat asleep"),
        (Operation("regex", r"(\w+) cat", r"cat, \1"), "red cat", "cat, red"),
        (Operation("regex", r"(?i)CAT$", "dog"), "a cat", "a dog"),
        (Operation("regex", r"\s+", " "), "ein  Kätzchen 🐈", "ein Kätzchen 🐈"),
        (Operation("trigger", "ohwx"), "a cat", "ohwx, a cat"),
        (Operation("trigger", "ohwx"), "a photo of OHWX, asleep", "a photo of OHWX, asleep"),
        (Operation("trigger", "ohwx"), "ohwxy", "ohwx, ohwxy"),
        (Operation("trigger", "ohwx"), "", "ohwx"),
    ],
)
def test_operation_makes_of_a_caption(operation, before, after):
    assert apply(operation, [before]) == [after]


@pytest.mark.parametrize(
    ("operation", "field", "sentence"),
    [
        (Operation("eat", "x"), "kind", "Choose one of: add, remove, rename, replace, prefix, suffix, regex, trigger."),
        (Operation("add", " "), "text", "Enter the text."),
        (Operation("add", ", ,"), "text", "Enter at least one tag."),
        (Operation("replace", ""), "text", "Enter the text."),
        (Operation("regex", "x" * 501), "text", "Use at most 500 characters of text."),
        (Operation("replace", "x", "\0"), "replacement", "Use at most 500 characters of text."),
        (Operation("prefix", "\ud800"), "text", "Use at most 500 characters of text."),
        (Operation("trigger"), "kind", "The dataset has no trigger word yet. Enter one first."),
    ],
)
def test_operation_that_is_none_is_refused(operation, field, sentence):
    with pytest.raises(UserError) as refused:
        checked(operation, trigger_word="")
    assert (refused.value.field, refused.value.message) == (field, sentence)


@pytest.mark.parametrize(
    ("pattern", "replacement", "sentence"),
    [
        ("(", "", "The pattern does not work: missing ), unterminated subpattern at position 0."),
        ("a", r"\2", "The pattern does not work: invalid group reference 2 at position 1."),
        ("", "b" * 500, "The pattern does not work: a caption would have more than 5,000 characters."),
    ],
)
def test_pattern_that_does_not_work_says_why(pattern, replacement, sentence):
    with pytest.raises(UserError) as refused:
        apply(Operation("regex", pattern, replacement), ["a" * 40])
    assert refused.value.message == sentence


@pytest.mark.parametrize(
    ("pattern", "replacement", "caption"),
    [
        (r"(a+)+$", "", "a" * 40 + "b"),
        (r"(?=(.*))", r"\1" * 160, "a" * 5000),
    ],
    ids=["endless", "memory"],
)
def test_hostile_pattern_is_ended(monkeypatch, pattern, replacement, caption):
    monkeypatch.setattr("datasets.caption_operations.REGEX_SECONDS", 1.0)
    with pytest.raises(UserError) as refused:
        apply(Operation("regex", pattern, replacement), [caption])
    assert refused.value.message == SLOW


def test_long_caption_is_refused():
    with pytest.raises(UserError, match="The caption has 5,003 characters"):
        apply(Operation("add", "x"), ["y" * 5000])


def test_word_is_found_alone_only():
    assert [has_word(text, "oh wx") for text in ("OH WX", "a oh wx, b", "(oh wx)", "ooh wx", "oh wxy", "ohwx")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
