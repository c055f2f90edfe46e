"""The built-in LoRA trainer of LoRA Pilot: a PyTorch program that imports no Django. See docs/trainer.md.

`config`, `buckets`, `data`, `errors`, `events`, `schedule`, `safetensors_header` and the detection in `architectures`
need no PyTorch, so that the web side may import them.
"""
