"""How the bundled base model pilot-tiny was made: drawn pictures, untrained models, training, and an automatic score.

`python -m lora_trainer.pilot_tiny draw|build|train|evaluate --help`; every step is reproducible from its seed.
"""
