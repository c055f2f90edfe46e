"""Pages of invitations: staff make and revoke them; whoever opens a link makes an account."""

from __future__ import annotations

from http import HTTPStatus

from django.contrib import messages
from django.contrib.auth.decorators import login_not_required
from django.core.paginator import Paginator
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods, require_POST, require_safe
from rest_framework.throttling import AnonRateThrottle

from lorapilot import invitations, services
from lorapilot.access import require_staff, signed_in
from lorapilot.accounts import INVITATION
from lorapilot.errors import Missing, UserError
from lorapilot.forms import InvitationForm

ON_A_PAGE = 50


class OpeningThrottle(AnonRateThrottle):
    """By address; of REST framework, which needs no more of a request than any has."""

    scope = "invitation"


def address_of(request: HttpRequest, secret: str) -> str:
    """The link that an invited person opens."""
    return request.build_absolute_uri(reverse("open_invitation", args=[secret]))


@require_http_methods(["GET", "HEAD", "POST"])
@never_cache
def invitation_list(request: HttpRequest) -> HttpResponse:
    """All invitations, and the form that makes one. The page after it shows the link, once."""
    staff = signed_in(request)
    require_staff(staff, invitations.STAFF_ONLY)
    form = InvitationForm(request.POST if request.method == "POST" else None)
    made = link = None
    if form.is_valid():
        try:
            made, secret = invitations.create_invitation(staff, request=request, **form.cleaned_data)
        except UserError as error:
            form.add_error(error.field or None, error.message)
        else:
            form, link = InvitationForm(), address_of(request, secret)
    page = Paginator(invitations.list_invitations(staff), ON_A_PAGE).get_page(request.GET.get("page"))
    context = {"form": form, "made": made, "link": link, "page": page}
    status = HTTPStatus.BAD_REQUEST if form.errors else HTTPStatus.OK
    return render(request, "lorapilot/invitations.html", context, status=status)


@require_POST
def revoke(request: HttpRequest, pk: int) -> HttpResponse:
    staff = signed_in(request)
    found = get_object_or_404(invitations.list_invitations(staff), pk=pk)
    invitations.revoke_invitation(found, actor=staff, request=request)
    messages.success(request, "The invitation is revoked: its link opens nothing any more.")
    return redirect("invitations")


@login_not_required
@require_safe
@never_cache
def open_invitation(request: HttpRequest, secret: str) -> HttpResponse:
    """Keeps the invitation in the session and leads to the sign-up. Looking at a link, as mail programs do, uses
    nothing up."""
    if request.user.is_authenticated:
        raise UserError("You have an account, and are signed in. Sign out first, or pass the link on.")
    throttle = OpeningThrottle()
    if not throttle.allow_request(request, None):  # type: ignore[arg-type]  # see above
        message = "Too many tries. Wait a minute, then open the link again."
        return render(request, "refused.html", {"message": message}, status=HTTPStatus.TOO_MANY_REQUESTS)
    digest = services.digest_of(secret)
    if invitations.find_open(digest) is None:
        raise Missing("This invitation was used or revoked, has expired, or is cut off. Ask for a new one.")
    request.session[INVITATION] = digest
    messages.info(request, "You are invited. Choose a name and a password.")
    return redirect("account_signup")
