"""The captioner's program with tiny models of our own making."""

import json

import pytest
from PIL import Image

from lora_trainer import command as trainer_command
from lora_trainer.captioning import command, tagger
from lora_trainer.captioning.order import Order
from lora_trainer.errors import ConfigError, ModelError
from tests.captioners import TAGS, WORDS, make_blip, make_tagger


@pytest.fixture
def pictures(tmp_path):
    """Red, green (a transparent one), and a file that is no picture."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    Image.new("RGBA", (64, 64), (0, 255, 0, 255)).save(tmp_path / "green.webp", lossless=True)
    (tmp_path / "none.png").write_bytes(b"no picture")
    return [str(tmp_path / name) for name in ("red.png", "green.webp", "none.png")]


@pytest.fixture
def work(tmp_path, pictures):
    """work(captioner="tagger", …): exit status and the events, without their times."""

    def worked(**values):
        order = {"events_file": str(tmp_path / "events.jsonl"), "pictures": pictures, "model": ""} | values
        (tmp_path / "order.json").write_text(json.dumps(order))
        status = trainer_command.main(["caption", str(tmp_path / "order.json")])
        lines = (tmp_path / "events.jsonl").read_text().splitlines()
        return status, [told for line in lines if (told := json.loads(line))["event"] != "progress"]

    return worked


def captions(events):
    return {told["image"]: told.get("caption") or told["reason"] for told in events if "image" in told}


# --- Tagger -----------------------------------------------------------------------------------------------------------
def test_tagger_names_what_is_above_the_thresholds(tmp_path, work):
    status, events = work(captioner="tagger", model=str(make_tagger(tmp_path / "tagger")), start_step=2)
    assert (status, [told["event"] for told in events]) == (
        0,
        ["stage", "started", "captioned", "captioned", "refused", "finished"],
    )
    assert captions(events) == {
        "red": "red queen, o_o",
        "green": "green leaf",
        "none": "The picture cannot be read: UnidentifiedImageError.",
    }
    assert (events[1]["start_step"], events[1]["total_steps"], events[-1]["step"], events[-1]["captioned"]) == (
        *(2, 5, 5),
        2,
    )


@pytest.mark.parametrize(
    ("values", "caption"),
    [
        ({"underscores_to_spaces": False}, "red_queen, o_o"),
        ({"exclude": ["Red Queen"]}, "o_o"),
        ({"general_threshold": 0.95}, "red queen"),
        ({"general_threshold": 0.2}, "red queen, o_o, blue sky, green leaf"),  # the white around it
        ({"character_threshold": 1.1, "general_threshold": 1.1}, ""),
    ],
)
def test_tagger_options(tmp_path, values, caption):
    made = make_tagger(tmp_path / "tagger")
    order = Order(captioner="tagger", model=str(made), pictures=[], events_file="", **values)
    assert tagger.Tagger(order).caption(Image.new("RGB", (64, 48), "red")) == caption


def test_tagger_without_a_tag_says_so(tmp_path, work):
    made = make_tagger(tmp_path / "tagger")
    status, events = work(captioner="tagger", model=str(made), general_threshold=1.1, character_threshold=1.1)
    assert captions(events)["red"] == "Nothing was found in the picture. Lower the thresholds."
    assert (status, events[-1]["captioned"]) == (0, 0)


def test_tagger_of_another_kind_is_refused(tmp_path, work):
    made = make_tagger(tmp_path / "tagger", tags=TAGS[:-1])
    status, events = work(captioner="tagger", model=str(made))
    assert (status, events[-1]["code"], "not of one tagger" in events[-1]["message"]) == (2, "model", True)
    (made / "model.onnx").write_bytes(b"no model")
    status, events = work(captioner="tagger", model=str(made))
    assert (status, "cannot be loaded" in events[-1]["message"]) == (2, True)


def test_tags_that_cannot_be_read_are_refused(tmp_path):
    for text in ("name\nx\n", "name,category\nx,many\n"):
        (tmp_path / "tags.csv").write_text(text)
        with pytest.raises(ModelError, match="cannot be read as a list of tags"):
            tagger.read_tags(tmp_path / "tags.csv")
    with pytest.raises(ModelError):
        tagger.read_tags(tmp_path / "none.csv")


def test_picture_is_padded_with_white_and_bgr():
    pixels = tagger.prepared(Image.new("RGB", (8, 4), (255, 0, 16)), 8)
    assert (pixels.shape, pixels.dtype) == ((1, 8, 8, 3), "float32")
    assert pixels[0, 4, 4].tolist() == [16, 0, 255]
    assert pixels[0, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("name", "shown"), [("long_hair", "long hair"), ("o_o", "o_o"), (">_<", ">_<"), ("3_3", "3_3"), ("solo", "solo")]
)
def test_faces_keep_their_underscores(name, shown):
    assert tagger._with_spaces(name) == shown


# --- Sentences --------------------------------------------------------------------------------------------------------
def test_sentences_of_a_transformers_model(tmp_path, work):
    made = make_blip(tmp_path / "blip")
    status, events = work(captioner="sentences", model=str(made), max_tokens=4)
    found = captions(events)
    assert (status, sorted(found), found["none"][:11]) == (0, ["green", "none", "red"], "The picture")
    assert set(found["red"].split()) <= set(WORDS)
    assert found["red"].split()
    status, events = work(captioner="sentences", model=str(made), max_tokens=4, prompt="a cat")
    assert captions(events)["red"].startswith("a cat")
    (made / "model.safetensors").rename(made / "pytorch_model.bin")
    status, events = work(captioner="sentences", model=str(made))
    assert (status, events[-1]["code"], "cannot be loaded" in events[-1]["message"]) == (2, "model", True)


# --- The program ------------------------------------------------------------------------------------------------------
class Eye:
    """Stands in for a model: it asks the program to stop after its first picture."""

    def __init__(self, stop=None):
        self.stop = stop

    def caption(self, image):
        if self.stop:
            self.stop.requested = True
        return f"{image.mode} {image.size}"


def test_stop_keeps_what_is_told(work, monkeypatch):
    made = []
    monkeypatch.setattr(command.StopSignal, "install", lambda self: made.insert(0, self))
    monkeypatch.setattr(command, "_load", lambda _order: Eye(made[0]))
    status, events = work(captioner="tagger")
    assert (status, [told["event"] for told in events]) == (130, ["stage", "started", "captioned", "stopped"])
    assert events[-1]["step"] == 1


def test_fault_of_our_own_is_told_as_one(work, monkeypatch, capsys):
    monkeypatch.setattr(command.StopSignal, "install", lambda _self: None)
    monkeypatch.setattr(command, "_load", lambda _order: 1 / 0)
    status, events = work(captioner="tagger")
    assert (status, events[-1]["code"]) == (1, "internal")
    assert "ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.parametrize("values", [{"captioner": "clippy"}, {"captioner": "tagger", "colour": "red"}])
def test_wrong_order_is_refused(tmp_path, pictures, values, monkeypatch, capsys):
    monkeypatch.setattr(command.StopSignal, "install", lambda _self: None)
    order = {"events_file": str(tmp_path / "events.jsonl"), "pictures": pictures, "model": "x"} | values
    (tmp_path / "order.json").write_text(json.dumps(order))
    assert command.main([str(tmp_path / "order.json")]) == 2
    assert "Error: " in capsys.readouterr().out


def test_order_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "order.json").write_text("[")
    with pytest.raises(ConfigError):
        command.read_order(tmp_path / "order.json")
    assert command.main([]) == 2
