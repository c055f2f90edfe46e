"""Errors that a user can act on. Services raise them; each surface shows them in its own form:
a form as a field error, a page as a message, the API as `{"detail": …}`, a command as exit code 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render


class UserError(Exception):
    """Bad input. `message` is a sentence that says what to do; `field` names the input it belongs to, if one; `also` is
    what else is wrong with the same input."""

    status = HTTPStatus.BAD_REQUEST

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.also: tuple[UserError, ...] = ()

    @property
    def all(self) -> tuple[UserError, ...]:
        return (self, *self.also)


class NotAllowed(UserError):
    """The caller sees the object, but may not change it."""

    status = HTTPStatus.FORBIDDEN


class Missing(UserError):
    """Something that the input names does not exist (or is a stranger's)."""

    status = HTTPStatus.NOT_FOUND


class Conflict(UserError):
    """The name is taken, or the object is no longer in a state that allows this."""

    status = HTTPStatus.CONFLICT


class Refusals:
    """Everything that is wrong with an input, not only what is found first: check each part `with refusals.caught()`,
    then `raise_any()`."""

    def __init__(self) -> None:
        self._found: list[UserError] = []

    @contextmanager
    def caught(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self._found.extend(error.all)

    def raise_any(self) -> None:
        """Raises the first UserError that was caught, with the others in its `also`."""
        if self._found:
            first, *others = self._found
            first.also = tuple(others)
            raise first


class UserErrorMiddleware:
    """Shows a UserError that no form caught as a page of its own, with the error's status."""

    sync_capable = async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponse | None:
        if not isinstance(exception, UserError):
            return None
        return render(request, "refused.html", {"message": exception.message}, status=exception.status)
