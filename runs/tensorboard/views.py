"""TensorBoard's page, and the way from there to the reader's own TensorBoard.

TensorBoard's scripts run in our origin: they read the session's data, as they must. What they could do there, should
somebody's event files ever get markup past TensorBoard, is limited by two policies:
- the frame runs its two own script files only, nothing inline, no eval; it asks at addresses below /tensorboard/app/
  only, submits no form, opens no window;
- the page around it, which the frame can reach, asks nowhere, opens no window, shows no other frame, and submits
  nothing but the sign-out.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode, urlsplit

from csp.constants import NONE, SELF, UNSAFE_INLINE
from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.urls import reverse
from django.views.decorators.clickjacking import xframe_options_sameorigin
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_http_methods, require_safe

from lorapilot.access import signed_in
from lorapilot.errors import NotAllowed
from lorapilot.models import User
from runs.tensorboard import proxy, sources, viewers

# What TensorBoard asks by POST: long questions that change nothing. All else is refused.
QUESTIONS = re.compile(
    r"(experiment/[^/]+/)?data/plugin/"
    r"(timeseries/timeSeries|scalars/scalars_multirun|hparams/(experiment|session_groups|metric_evals))"
)
NO_ANSWER = (
    "TensorBoard does not answer. Load the page again; if that does not help, logs/tensorboard.log may tell why."
)


def _hosts(request: HttpRequest) -> list[str]:
    """Ours, by the name that the browser knows; behind some proxies only the settings know the port."""
    return [request.get_host(), *(urlsplit(origin).netloc for origin in settings.CSRF_TRUSTED_ORIGINS)]


def _below(request: HttpRequest, path: str) -> list[str]:
    """Sources of a policy: our own address, narrowed to a path. Policies cannot name an IPv6 address."""
    return [SELF if host.startswith("[") else f"{host}{path}" for host in _hosts(request)]


def _frame_policy(request: HttpRequest) -> dict[str, list[str]]:
    app = reverse("tensorboard:app")
    anything = _below(request, app)
    return {
        "default-src": [NONE],
        "script-src": _below(request, f"{app}index.js"),
        "worker-src": _below(request, f"{app}chart_worker.js"),
        "style-src": [UNSAFE_INLINE],
        "connect-src": anything,
        "font-src": [*anything, "data:"],
        "img-src": [*anything, "data:", "blob:"],
        "base-uri": [NONE],
        "form-action": [NONE],
        "frame-ancestors": [SELF],
        "sandbox": ["allow-scripts", "allow-same-origin", "allow-downloads"],
    }


def _page_policy(request: HttpRequest) -> dict[str, list[str]]:
    return {
        "connect-src": [NONE],
        "frame-src": _below(request, reverse("tensorboard:app")),
        "form-action": _below(request, reverse("account_logout")),
        "sandbox": ["allow-scripts", "allow-same-origin", "allow-forms", "allow-downloads"],
    }


@require_safe
def show(request: HttpRequest) -> HttpResponse:
    """TensorBoard in a frame, with `?run=` reduced to one run; or why there is nothing to show yet."""
    found = sources.runs_with_events(signed_in(request))
    name = request.GET.get("run", "")
    context: dict[str, Any] = {"found": found, "reason": sources.NOTHING, "frame": _frame_address(name)}
    if name and name not in {source.run.output_name for source in found}:
        context |= {"name": name, "is_missing": bool(found), "frame": _frame_address("")}
    response = render(request, "runs/tensorboard.html", context)
    if found:
        response._csp_replace = _page_policy(request)  # type: ignore[attr-defined]  # django-csp's
    return response


def _frame_address(name: str) -> str:
    """TensorBoard's own filter takes a regular expression; of a run's name only the dots mean something there."""
    only = {"runFilter": f"^{name.replace('.', '[.]')}(~|$)"} if name else {}
    return f"{reverse('tensorboard:app')}{f'?{urlencode(only)}' if only else ''}#timeseries"


@csrf_exempt  # TensorBoard knows nothing of our token; see _refuse_others
@xframe_options_sameorigin
@require_http_methods(["GET", "HEAD", "POST"])
async def app(request: HttpRequest, path: str = "") -> HttpResponseBase:
    """The reader's own TensorBoard."""
    if request.method == "POST":
        if not QUESTIONS.fullmatch(path):
            return HttpResponseNotAllowed(["GET", "HEAD"])
        _refuse_others(request)
    response = await _ask(request, await request.auser(), is_page_load=not path)  # type: ignore[arg-type]  # signed in
    response._csp_config = _frame_policy(request)  # type: ignore[attr-defined]  # django-csp's
    return response


def _refuse_others(request: HttpRequest) -> None:
    """Another site's page may not even ask."""
    if urlsplit(request.headers.get("Origin", "")).netloc not in _hosts(request):
        raise NotAllowed("TensorBoard is asked by its own page only.")


async def _ask(request: HttpRequest, user: User, *, is_page_load: bool) -> HttpResponseBase:
    address = await viewers.VIEWERS.open(user, is_page_load=is_page_load)
    try:
        answer = await proxy.ask(
            address, request.method or "GET", request.get_full_path(), request.headers, request.body
        )
    except proxy.NoAnswer:
        return HttpResponse(NO_ANSWER, status=HTTPStatus.BAD_GATEWAY, content_type="text/plain; charset=utf-8")
    if request.method == "HEAD":
        answer.body.close()
        return HttpResponse(status=answer.status, headers=answer.headers)
    return StreamingHttpResponse(answer.body, status=answer.status, headers=answer.headers)
