"""What captioners find, for the job and for runs: written down as proposals, beside the captions that are there.

Guarantee: a proposal is recorded once, by the conditional UPDATE from `waiting`.
"""

from __future__ import annotations

from typing import Any

from django.db.models import QuerySet

from datasets.captioning.enums import Captioner, Proposal
from datasets.captioning.options import with_trigger
from datasets.captioning.providers import Answer, Provider, provider_of
from datasets.captions import clean_caption
from datasets.models import CaptionProposal
from lorapilot.errors import UserError
from lorapilot.models import User
from lorapilot.selectors import reveal_secret


def provider_in_name_of(user: User, captioner: Captioner, model: str) -> Provider:
    """With the user's key as it is now. Raises UserError without one."""
    return provider_of(captioner, model, reveal_secret(user, captioner))


def record_caption(proposals: QuerySet[CaptionProposal], answer: Answer) -> None:
    """Keep a caption for the picture of `proposals`, which name at most one; what no longer waits is left alone."""
    found = proposals.filter(state=Proposal.WAITING).select_related("picture", "captioning__dataset").first()
    if found is None:
        return
    values: dict[str, Any] = {"input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens}
    trigger_word = found.captioning.dataset.trigger_word if found.captioning.options["begin_with_trigger"] else ""
    try:
        caption = clean_caption(with_trigger(answer.caption, trigger_word))
    except UserError as error:
        values |= {"state": Proposal.FAILED, "reason": error.message}
    else:
        values |= {"state": Proposal.PROPOSED, "caption": caption, "previous": found.picture.caption}
    CaptionProposal.objects.filter(pk=found.pk, state=Proposal.WAITING).update(**values)


def record_failure(
    proposals: QuerySet[CaptionProposal], reason: str, *, input_tokens: int = 0, output_tokens: int = 0
) -> None:
    """Keep why there is no caption for the picture."""
    used = {"input_tokens": input_tokens, "output_tokens": output_tokens}
    proposals.filter(state=Proposal.WAITING).update(state=Proposal.FAILED, reason=reason, **used)


def skip(proposals: QuerySet[CaptionProposal]) -> None:
    proposals.filter(state=Proposal.WAITING).update(
        state=Proposal.DISCARDED, reason="Somebody has written a caption meanwhile."
    )
