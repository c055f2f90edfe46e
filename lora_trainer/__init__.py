"""The built-in LoRA trainer of LoRA Pilot: a PyTorch program that imports no Django. See docs/trainer.md.

`config`, `buckets`, `data`, `errors`, `events`, `model_folder`, `schedule` and `safetensors_header` need no PyTorch,
so that the web side may import them.
"""
