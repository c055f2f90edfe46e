"""Everything that changes captionings and their proposals. A picture's caption changes in `accept` and `undo` alone,
through datasets/caption_edits.py.

Guarantee: a caption that somebody changed after the proposal was made is only overwritten when the caller says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from django.db import transaction

from datasets.caption_edits import lock_dataset, replace_captions
from datasets.captioning.asking import Asker, Busy
from datasets.captioning.enums import REMOTE, Captioner, Proposal, Which
from datasets.captioning.job import caption_remotely
from datasets.captioning.options import checked_options, filled_prompt, with_trigger
from datasets.captioning.providers import Answer, ProviderError
from datasets.captioning.recording import provider_in_name_of
from datasets.captioning.selectors import has_job
from datasets.captioning.shrinking import as_jpeg
from datasets.captions import clean_caption
from datasets.models import Captioning, CaptionProposal, Dataset, Picture
from datasets.pictures import picture_path
from lorapilot import jobs
from lorapilot.errors import Conflict, UserError
from lorapilot.models import User

AT_ONCE = 500  # rows in one statement
MOST_SELECTED = 20_000


# --- Orders -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What somebody asks for, before it is checked."""

    captioner: str
    model: str
    which: str = Which.MISSING
    overwrite: bool = False
    pictures: Iterable[int] = ()  # ids, for `selected`
    options: Mapping[str, Any] | None = None


@transaction.atomic
def create_captioning(owner: User, dataset: Dataset, order: Order) -> Captioning:
    """The order with a waiting proposal for each of its pictures; nothing does it yet. Raises UserError."""
    lock_dataset(dataset.pk)
    captioner = checked_captioner(order.captioner)
    if order.which not in Which.values:
        raise UserError("Caption missing, all or selected pictures.", field="which")
    options = checked_options(captioner, order.options or {})
    chosen = _chosen(dataset, order)
    captioning = Captioning.objects.create(
        dataset=dataset,
        owner=owner,
        captioner=captioner,
        model=checked_model(order.model),
        which=order.which,
        overwrite=order.overwrite and order.which != Which.MISSING,
        options=options,
    )
    waiting = (CaptionProposal(captioning=captioning, picture_id=pk) for pk in chosen)
    CaptionProposal.objects.bulk_create(waiting, batch_size=500)
    return captioning


def checked_captioner(name: str) -> Captioner:
    if name not in Captioner.values:
        raise UserError(f"Choose one of: {', '.join(Captioner.values)}.", field="captioner")
    return Captioner(name)


def checked_model(name: str) -> str:
    name = name.strip()
    if not name or len(name) > 200 or not name.isprintable():
        raise UserError("Name the model.", field="model")
    return name


def _chosen(dataset: Dataset, order: Order) -> list[int]:
    found = dataset.pictures.order_by("pk")
    if order.which == Which.SELECTED:
        wanted = set(order.pictures)
        if not wanted or len(wanted) > MOST_SELECTED:
            raise UserError(f"Select between 1 and {MOST_SELECTED:,} pictures.", field="pictures")
        there = set(found.values_list("pk", flat=True))
        if not wanted <= there:
            raise UserError("Some of the selected pictures are no longer in the dataset.", field="pictures")
    if order.which == Which.MISSING or not order.overwrite:
        found = found.filter(caption="")
    chosen = list(found.values_list("pk", flat=True))
    if order.which == Which.SELECTED:
        chosen = [pk for pk in chosen if pk in wanted]
    if not chosen:
        raise UserError(
            "There is no picture without a caption among them. Choose to overwrite, or add pictures first.",
            field="which",
        )
    return chosen


def start_remote(owner: User, dataset: Dataset, order: Order) -> Captioning:
    """Begin to ask a provider about the pictures, in the background, with `owner`'s key."""
    captioner = checked_captioner(order.captioner)
    if captioner not in REMOTE:
        raise UserError(f"{captioner.label} is no provider.", field="captioner")
    provider_in_name_of(owner, captioner, checked_model(order.model))
    with transaction.atomic():
        captioning = create_captioning(owner, dataset, order)
        _enqueue(captioning)
    return captioning


def _enqueue(captioning: Captioning) -> None:
    label = f"Captions for {captioning.dataset}, {captioning.model}"[:200]
    captioning.job = jobs.enqueue(caption_remotely, label=label, owner=captioning.owner, captioning_id=captioning.pk)
    captioning.save(update_fields=["job"])


@transaction.atomic
def go_on(captioning: Captioning) -> Captioning:
    """Ask a provider again for what still waits and for what failed. Raises Conflict while it is at work, or when
    there is nothing left."""
    lock_dataset(captioning.dataset_id)
    locked: Captioning = Captioning.objects.select_for_update(of=("self",)).select_related("job").get(pk=captioning.pk)
    if has_job(locked):
        raise Conflict("It is at work already.")
    try_failed_again(locked)
    provider_in_name_of(locked.owner, Captioner(locked.captioner), locked.model)
    _enqueue(locked)
    captioning.job = locked.job
    return captioning


def try_failed_again(captioning: Captioning) -> None:
    """What failed waits again. Raises Conflict when nothing waits then."""
    captioning.proposals.filter(state=Proposal.FAILED).update(state=Proposal.WAITING, reason="")
    if not captioning.proposals.filter(state=Proposal.WAITING).exists():
        raise Conflict("Every picture has its proposal: there is nothing left to ask for.")


def cancel(captioning: Captioning) -> None:
    """What has been proposed stays."""
    if captioning.job is None or not has_job(captioning):
        raise Conflict("It has ended already.")
    jobs.cancel(captioning.job)


def try_one(user: User, picture: Picture, order: Order) -> Answer:
    """Ask a provider about one picture, at once; nothing is kept. Raises ProviderError with its reason."""
    captioner = checked_captioner(order.captioner)
    if captioner not in REMOTE:
        raise UserError(f"{captioner.label} runs in the queue: start it on one selected picture.", field="captioner")
    options = checked_options(captioner, order.options or {})
    provider = provider_in_name_of(user, captioner, checked_model(order.model))
    jpeg = as_jpeg(picture_path(picture.sha256, picture.extension), pixels=options["pixels"])
    trigger_word = picture.dataset.trigger_word
    try:
        answer = Asker(provider).ask(filled_prompt(options["prompt"], trigger_word), jpeg, options["max_tokens"])
    except Busy as error:
        raise ProviderError(f"{error} Try again later.") from None
    caption = clean_caption(with_trigger(answer.caption, trigger_word if options["begin_with_trigger"] else ""))
    return Answer(caption, answer.input_tokens, answer.output_tokens)


# --- Review -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Accepted:
    """`changed`: left for review, since their pictures' captions were changed after the proposal was made."""

    accepted: int
    changed: int


def edit(proposal: CaptionProposal, *, caption: str) -> CaptionProposal:
    """Change what is proposed. Raises Conflict when it is no longer to be reviewed."""
    text = clean_caption(caption)
    open_ = CaptionProposal.objects.filter(pk=proposal.pk, state=Proposal.PROPOSED)
    if not open_.update(caption=text):
        raise Conflict("This proposal was accepted or discarded already.")
    proposal.caption = text
    return proposal


def accept(
    captioning: Captioning, *, actor: User, proposals: Iterable[int] | None = None, even_if_changed: bool = False
) -> Accepted:
    """Put proposals in the place of the captions, all in one transaction: all that are to be reviewed, or those with
    these ids. Many at once are one of the dataset's last edits, which can be undone there, too."""
    with transaction.atomic():
        open_ = _locked(captioning, _open(captioning, proposals), Proposal.PROPOSED)
        due = [proposal for proposal in open_ if even_if_changed or not proposal.differs_since]
        texts = {proposal.picture_id: proposal.caption for proposal in due}
        for proposal in due:
            proposal.state, proposal.previous = Proposal.ACCEPTED, proposal.picture.caption
        _replace(captioning, texts, label=f"Captions by {captioning.model}", actor=actor)
        CaptionProposal.objects.bulk_update(due, ["state", "previous"], batch_size=AT_ONCE)
    return Accepted(len(due), len(open_) - len(due))


def _replace(captioning: Captioning, texts: dict[int, str], *, label: str, actor: User) -> None:
    if texts:
        replace_captions(captioning.dataset, captions=texts, label=label, actor=actor)


@transaction.atomic
def discard(captioning: Captioning, *, proposals: Iterable[int] | None = None) -> int:
    """Returns how many. The captions stay as they are."""
    lock_dataset(captioning.dataset_id)
    found = CaptionProposal.objects.filter(pk__in=_open(captioning, proposals), state=Proposal.PROPOSED)
    return found.update(state=Proposal.DISCARDED)


def undo(captioning: Captioning, *, actor: User) -> Accepted:
    """Give every picture whose proposal was accepted its earlier caption again, unless somebody changed it since; the
    proposals are to be reviewed again."""
    with transaction.atomic():
        accepted = _locked(captioning, captioning.proposals.values_list("pk", flat=True), Proposal.ACCEPTED)
        if not accepted:
            raise Conflict("Nothing of this was accepted.")
        due = [proposal for proposal in accepted if proposal.picture.caption == proposal.caption]
        texts = {proposal.picture_id: proposal.previous for proposal in due}
        _replace(captioning, texts, label=f"Undo captions by {captioning.model}", actor=actor)
        CaptionProposal.objects.filter(pk__in=[proposal.pk for proposal in due]).update(state=Proposal.PROPOSED)
    return Accepted(len(due), len(accepted) - len(due))


def _open(captioning: Captioning, wanted: Iterable[int] | None) -> list[int]:
    """Ids of what is to be reviewed. Raises Conflict when there is none (any more)."""
    found = list(captioning.proposals.filter(state=Proposal.PROPOSED).values_list("pk", flat=True))
    if wanted is not None:
        chosen = set(wanted)
        found = [pk for pk in found if pk in chosen]
    if not found:
        raise Conflict("None of these proposals is to be reviewed (any more).")
    return found


def _locked(captioning: Captioning, ids: Iterable[int], state: Proposal) -> list[CaptionProposal]:
    """Those in this state, with their pictures, which change no more until the transaction ends."""
    lock_dataset(captioning.dataset_id)
    rows = CaptionProposal.objects.select_for_update(of=("self", "picture")).order_by("pk")
    return list(rows.select_related("picture").filter(pk__in=ids, state=state))
