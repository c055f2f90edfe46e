"""Tiny captioners of our own making, for the real programs: a tagger in ONNX, and a BLIP with random weights."""

from __future__ import annotations

import csv
import json

TAGS = [("general", 9), ("blue_sky", 0), ("green_leaf", 0), ("red_queen", 4), ("o_o", 0)]
WORDS = ["a", "cat", "dog", "red", "on", "mat"]


def make_tagger(folder, *, side=8, tags=TAGS):
    """It sees colours: a tag's probability is the mean of a channel. Needs the onnx package."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper, save

    weights = np.zeros((3, len(TAGS)), np.float32)  # from blue, green, red
    weights[0, 1] = weights[1, 2] = weights[2, 3] = 1 / 255
    weights[2, 4] = 0.9 / 255
    weights[:, 0] = 1 / 255
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["output"]),
    ]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, side, side, 3])
    answer = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, len(TAGS)])
    constants = [
        numpy_helper.from_array(weights, "weights"),
        numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
    ]
    graph = helper.make_graph(nodes, "tagger", [given], [answer], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir(parents=True)
    save(model, str(folder / "model.onnx"))
    write_tags(folder, tags)
    return folder


def write_tags(folder, tags=TAGS):
    with (folder / "selected_tags.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["tag_id", "name", "category", "count"])
        rows.writerows([number, name, category, 1] for number, (name, category) in enumerate(tags))


def make_blip(folder):
    """It writes words without sense, always as many as it may, since it cannot end a sentence."""
    import torch
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    folder.mkdir(parents=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    (folder / "vocab.txt").write_text("\n".join(special + WORDS) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3}
    text = size | tokens | {"vocab_size": len(special + WORDS), "encoder_hidden_size": 16, "projection_dim": 16}
    vision = size | {"image_size": 32, "patch_size": 16, "projection_dim": 16}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[: len(special)] = -1e4
    model.save_pretrained(folder)
    pictures = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(pictures, tokenizer).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures.to_dict()))
    return folder
