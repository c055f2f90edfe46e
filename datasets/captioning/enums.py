"""Who makes captions, of which pictures, and what becomes of a proposal."""

from __future__ import annotations

from django.db import models


class Captioner(models.TextChoices):
    OPENAI = "openai", "OpenAI, or a server like it"
    GEMINI = "gemini", "Google Gemini"
    XAI = "xai", "xAI"
    TAGGER = "tagger", "Tagger on this installation (ONNX)"
    SENTENCES = "sentences", "Sentences on this installation (transformers)"


REMOTE = frozenset({Captioner.OPENAI, Captioner.GEMINI, Captioner.XAI})
LOCAL = frozenset(set(Captioner) - REMOTE)


class Which(models.TextChoices):
    """The pictures of an order. Only those of `all` and `selected` may have a caption already: skip or overwrite."""

    MISSING = "missing", "Only those without a caption"
    ALL = "all", "All"
    SELECTED = "selected", "The selected ones"


class Proposal(models.TextChoices):
    WAITING = "waiting", "Waiting"
    PROPOSED = "proposed", "To be reviewed"
    FAILED = "failed", "Failed"
    ACCEPTED = "accepted", "Accepted"
    DISCARDED = "discarded", "Discarded"
