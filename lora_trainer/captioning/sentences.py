"""A transformers folder of BLIP's kind: a picture in, a sentence out. Only safetensors, only files of this machine, and
no code from the folder."""

from typing import Any

from PIL import Image

from lora_trainer.captioning.order import Order
from lora_trainer.errors import ModelError


class Writer:
    """`order.prompt` is how the sentence begins; empty: the model's own beginning."""

    def __init__(self, order: Order) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.order = order
        known = {"local_files_only": True, "trust_remote_code": False}
        self.dtype = torch.float16 if order.device == "cuda" else torch.float32
        try:
            self.processor: Any = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]  # has no types
                order.model, **known
            )
            model: Any = AutoModelForImageTextToText.from_pretrained(
                order.model, use_safetensors=True, dtype=self.dtype, **known
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{order.model} cannot be loaded: {str(error).splitlines()[0][:300]}") from None
        self.model = model.to(order.device).eval()

    def caption(self, image: Image.Image) -> str:
        """`image` is RGB."""
        import torch

        text = {"text": self.order.prompt} if self.order.prompt else {}
        given = self.processor(images=image, return_tensors="pt", **text).to(self.order.device, self.dtype)
        with torch.inference_mode():
            written = self.model.generate(**given, max_new_tokens=self.order.max_tokens)
        return str(self.processor.batch_decode(written, skip_special_tokens=True)[0]).strip()
