"""Captions pictures on this machine: `lora_trainer caption order.json`.

A tagger of WD14's kind through ONNX Runtime, or a transformers model that writes sentences. `order` says what it is
told, `command` what it tells.
"""
