"""Pages of automatic captions, below a dataset's: the form, how it goes, and the review of what is proposed."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_http_methods, require_POST, require_safe
from django_htmx.http import trigger_client_event

from datasets.captioning import selectors, services
from datasets.captioning.enums import LOCAL, REMOTE, Captioner, Proposal, Which
from datasets.captioning.providers import ProviderError, needs_key
from datasets.models import Captioning, CaptionProposal, Dataset, Picture
from datasets.selections import Selection
from lorapilot.access import get_editable, is_number, signed_in
from lorapilot.errors import UserError
from lorapilot.models import User
from lorapilot.selectors import secrets_of
from runs import captioning as captions
from runs.captioning_forms import CaptioningForm

PROPOSALS_A_PAGE = 60


# --- The form ---------------------------------------------------------------------------------------------------------
@require_http_methods(["GET", "HEAD", "POST"])
def new(request: HttpRequest, pk: int) -> HttpResponse:
    """For the pictures that `?pictures=3,5` names, or that were selected in the grid, whose form posts to here. What
    was filled in is kept when it is refused, or only tried."""
    user = signed_in(request)
    dataset = get_editable(Dataset, user, pk=pk)
    if request.method != "POST" or "captioner" not in request.POST:
        chosen = _chosen(request, dataset)
        return _page(request, CaptioningForm(dataset=dataset, chosen=chosen))
    form = CaptioningForm(request.POST, dataset=dataset)
    tried = None
    if form.is_valid():
        try:
            if "try" not in request.POST:
                made = captions.start(user, dataset, form.order())
                return redirect("captioning:show", pk, made.pk)
            tried = _tried(request, form)
        except UserError as error:
            form.add_error(error.field if error.field in form.fields else None, error.message)
            return _page(request, form, status=_status_of(error))
    return _page(request, form, tried=tried, status=HTTPStatus.OK if tried else HTTPStatus.BAD_REQUEST)


def _chosen(request: HttpRequest, dataset: Dataset) -> list[int]:
    if request.method != "POST":
        return _ids(str(request.GET.get("pictures", "")).split(","))
    picked = [str(one) for one in request.POST.getlist("picture")]
    return [row["pk"] for row in Selection.from_form(request.POST, picked).rows(dataset)]


def _tried(request: HttpRequest, form: CaptioningForm) -> dict[str, Any]:
    """One picture of those that are meant, and what the provider says of it."""
    order = form.order()
    found = form.dataset.pictures.order_by("pk")
    wanted = found.filter(pk__in=order.pictures) if order.which == Which.SELECTED else found
    picture: Picture | None = wanted.filter(caption="").first() or wanted.first()
    if picture is None:
        raise UserError("Add a picture first.", field="which")
    return {"picture": picture, "answer": services.try_one(signed_in(request), picture, order)}


def _status_of(error: UserError) -> int:
    return error.status if isinstance(error, ProviderError) else HTTPStatus.BAD_REQUEST


def _page(
    request: HttpRequest, form: CaptioningForm, *, tried: dict[str, Any] | None = None, status: int = HTTPStatus.OK
) -> HttpResponse:
    keys = {secret.name for secret in secrets_of(signed_in(request))}
    orders = [
        {"captioning": found, "counts": selectors.counts_of(found), "activity": captions.activity_of(found)}
        for found in selectors.captionings_of(form.dataset).prefetch_related("runs")[:20]
    ]
    context = {
        "dataset": form.dataset,
        "form": form,
        "tried": tried,
        "orders": orders,
        "providers": [
            {
                "captioner": one,
                "has_key": one in keys,
                "needs_key": needs_key(one),
                "url": settings.CAPTION_URLS[one],
            }
            for one in Captioner
            if one in REMOTE
        ],
        "local": [{"captioner": one, "models": captions.local_models(one)} for one in Captioner if one in LOCAL],
    }
    return render(request, "captioning/new.html", context, status=status)


# --- One order --------------------------------------------------------------------------------------------------------
@require_safe
def show(request: HttpRequest, pk: int, captioning_id: int) -> HttpResponse:
    """How it goes, and what is to be reviewed. `?show=` another state's."""
    captioning = _captioning(request, pk, captioning_id)
    wanted = str(request.GET.get("show", Proposal.PROPOSED))
    state = wanted if wanted in Proposal.values else Proposal.PROPOSED
    found = selectors.proposals_of(captioning, state=state)
    context = {
        "page": Paginator(found, PROPOSALS_A_PAGE).get_page(request.GET.get("page")),
        "state": state,
        "states": Proposal,
    }
    found_now = _status(captioning)
    return render(request, "captioning/show.html", context | found_now | {"seen": found_now["counts"].proposed})


@require_safe
def status(request: HttpRequest, pk: int, captioning_id: int) -> HttpResponse:
    """The part of the page that asks again while it is at work. When the first proposals are there, and when it ends,
    it has the page fetch the review; `seen`: how many there were to review when the page last did."""
    found = _status(_captioning(request, pk, captioning_id))
    seen = str(request.GET.get("seen", ""))
    has_ended = not found["activity"].is_active
    has_come = seen == "0" and found["counts"].proposed > 0
    shown = found["counts"].proposed if has_ended or has_come or not is_number(seen) else int(seen)
    context = found | {"seen": shown, "is_later": True}
    answer = render(request, "captioning/_status.html", context)
    return trigger_client_event(answer, "captioning-came") if has_ended or has_come else answer


def _status(captioning: Captioning) -> dict[str, Any]:
    counts = selectors.counts_of(captioning)
    return {
        "dataset": captioning.dataset,
        "captioning": captioning,
        "counts": counts,
        "cost": selectors.cost_so_far(captioning, counts),
        "activity": captions.activity_of(captioning),
    }


@require_POST
def review(request: HttpRequest, pk: int, captioning_id: int) -> HttpResponse:
    """The form around the proposals: its edits are kept, whatever its button does."""
    captioning = _captioning(request, pk, captioning_id)
    _keep_edits(request, captioning)
    name, _, argument = str(request.POST.get("do", "")).partition(":")
    if name in ACTIONS:
        messages.success(request, ACTIONS[name](captioning, _wanted(request, argument), signed_in(request)))
    back = request.POST.get("page", "")
    suffix = f"?page={back}" if back.isascii() and back.isdigit() else ""
    response = redirect("captioning:show", pk, captioning_id)
    response["Location"] += suffix
    return response


def _keep_edits(request: HttpRequest, captioning: Captioning) -> None:
    fields = {name: str(text) for name, text in request.POST.items() if name.startswith("caption-")}
    typed = {name.removeprefix("caption-"): text for name, text in fields.items()}
    open_ = captioning.proposals.filter(pk__in=_ids(typed), state=Proposal.PROPOSED)
    for proposal in open_:
        text = typed[str(proposal.pk)]
        if " ".join(text.split()) != " ".join(proposal.caption.split()):
            services.edit(proposal, caption=text)


def _wanted(request: HttpRequest, argument: str) -> list[int] | None:
    """None: all. Raises UserError when none was ticked."""
    if argument == "all":
        return None
    found = _ids(request.POST.getlist("proposal") if argument == "ticked" else [argument])
    if not found:
        raise UserError("Tick the proposals that you mean first.")
    return found


def _accept(captioning: Captioning, wanted: list[int] | None, actor: User) -> str:
    # A person who accepts a single one has both captions before them.
    is_single = wanted is not None and len(wanted) == 1
    return _told("accepted", services.accept(captioning, actor=actor, proposals=wanted, even_if_changed=is_single))


def _discard(captioning: Captioning, wanted: list[int] | None, _actor: User) -> str:
    return f"Discarded: {services.discard(captioning, proposals=wanted)}."


def _told(what: str, done: services.Accepted) -> str:
    left = f" Left for you, since their captions were changed meanwhile: {done.changed}." if done.changed else ""
    return f"Captions {what}: {done.accepted}.{left}"


ACTIONS: dict[str, Callable[[Captioning, list[int] | None, User], str]] = {"accept": _accept, "discard": _discard}


@require_POST
def edit(request: HttpRequest, pk: int, captioning_id: int, proposal_id: int) -> HttpResponse:
    """htmx, as soon as the field is left."""
    captioning = _captioning(request, pk, captioning_id)
    proposal = get_object_or_404(CaptionProposal, captioning=captioning, pk=proposal_id)
    try:
        services.edit(proposal, caption=request.POST.get(f"caption-{proposal_id}", ""))
    except UserError as error:
        return render(request, "captioning/_edited.html", {"error": error.message})
    return render(request, "captioning/_edited.html")


@require_POST
def undo(request: HttpRequest, pk: int, captioning_id: int) -> HttpResponse:
    done = services.undo(_captioning(request, pk, captioning_id), actor=signed_in(request))
    messages.success(request, _told("given back", done))
    return redirect("captioning:show", pk, captioning_id)


@require_POST
def cancel(request: HttpRequest, pk: int, captioning_id: int) -> HttpResponse:
    captions.cancel(_captioning(request, pk, captioning_id), actor=signed_in(request))
    return redirect("captioning:show", pk, captioning_id)


@require_POST
def go_on(request: HttpRequest, pk: int, captioning_id: int) -> HttpResponse:
    captions.go_on(_captioning(request, pk, captioning_id), actor=signed_in(request))
    return redirect("captioning:show", pk, captioning_id)


def _captioning(request: HttpRequest, pk: int, captioning_id: int) -> Captioning:
    return selectors.editable_captioning(signed_in(request), dataset_id=pk, captioning_id=captioning_id)


def _ids(texts: Any) -> list[int]:
    """Those of `texts` that can be ids."""
    return [int(text) for text in texts if is_number(text)]
