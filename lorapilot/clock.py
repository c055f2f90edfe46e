"""Moments by the database's clock, which all hosts share: a host whose own clock is wrong is not taken for silent."""

from __future__ import annotations

from datetime import timedelta

from django.db.models import DateTimeField, DurationField, ExpressionWrapper, Q, Value
from django.db.models.expressions import Combinable
from django.db.models.functions import Now


def ago(span: timedelta) -> Combinable:
    """`span` before now, as an expression for a filter or an update."""
    return ExpressionWrapper(Now() - Value(span, output_field=DurationField()), output_field=DateTimeField())


def is_stale(field: str, span: timedelta) -> Q:
    """Never set, or longer ago than `span`; also when it lies as far in the future: the clock was set back."""
    future = ExpressionWrapper(Now() + Value(span, output_field=DurationField()), output_field=DateTimeField())
    return Q(**{f"{field}__isnull": True}) | Q(**{f"{field}__lt": ago(span)}) | Q(**{f"{field}__gt": future})
