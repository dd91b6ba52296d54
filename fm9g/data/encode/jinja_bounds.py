"""A Jinja environment with bounds: a chat template comes with a model, from an unknown author.

Operations that multiply sizes are checked before they run, because one step of Python cannot be interrupted. Operations
that only add are left to the limits of time and memory on a rendering (fm9g.data.encode.template). So is printing
nested lists, during which Python does handle signals.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_SIZE = 1 << 28  # characters or items; a rendered conversation of a million tokens has some 2**22 characters
_MAX_BITS = 1 << 16  # of an integer
_NUMBER = re.compile(r"\d+")
_INNER_FIELD = re.compile(r"\{[^{}]*:[^{}]*\{")  # a width that is an argument: "{:{width}}"
# Filters whose result is no larger than their input.
_UNCHECKED_FILTERS = """
attr count d default first items last length list map reject rejectattr round safe select selectattr sort sum trim
truncate unique
""".split()  # noqa: SIM905
# Methods of str likewise; templates apply them to complete messages.
_UNCHECKED_METHODS = """
count endswith find index lstrip partition removeprefix removesuffix rfind rindex rpartition rsplit rstrip split
startswith strip
""".split()  # noqa: SIM905


class TooLargeError(ValueError):
    """A template would build a larger value than MAX_SIZE or _MAX_BITS allow."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Raises TooLargeError instead of building a text or list of more than MAX_SIZE."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.concat = _bounded_join  # type: ignore[method-assign]

    def bound_filters(self) -> None:
        """Bounds the filters; call it when all filters are registered."""
        self.filters |= {
            name: _bound_filter(call, _CHECKS.get(name, _check_product))
            for name, call in self.filters.items()
            if name not in _UNCHECKED_FILTERS
        }

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() * abs(right), _MAX_BITS)
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() + right.bit_length(), _MAX_BITS)
        elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
            _check_product(left, (right,))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as in the base
        of = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # a format of str is wrapped
        if isinstance(of, (str, bytes, int)):
            name, values = __obj.__name__, (*args, *kwargs.values())
            if isinstance(of, str) and name in ("format", "format_map"):
                _check_format(of, values, stars=bool(_INNER_FIELD.search(of)))
            elif name == "replace" and not kwargs:
                _check_replace(of, args)
            elif name not in _UNCHECKED_METHODS:
                _check_product(of, values)
        return super().call(__context, __obj, *args, **kwargs)


def _bounded_join(parts: Iterable[str]) -> str:
    parts = list(parts)
    _check(sum(map(len, parts)))
    return "".join(parts)


def _bound_filter(call: Callable[..., Any], check: Callable[[Any, tuple[Any, ...]], None]) -> Callable[..., Any]:
    """A filter that checks its value and arguments before it runs."""
    first = 1 if hasattr(call, "jinja_pass_arg") else 0  # a context or environment comes before the value

    @functools.wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if len(args) > first:
            # Keyword arguments may come in any order.
            strict = _check_product if kwargs and check is _check_replace else check
            strict(args[first], (*args[first + 1 :], *kwargs.values()))
        return call(*args, **kwargs)

    return checked


def _check_product(value: Any, others: Iterable[Any]) -> None:
    """Checks the largest result if each part of a value is replaced by all the others, or padded to these widths."""
    other_sizes = sum(abs(other) if isinstance(other, int) else _text_size(other) for other in others)
    _check((1 + _text_size(value)) * (1 + other_sizes))


def _check_replace(value: Any, others: tuple[Any, ...]) -> None:
    """others: old and new text. In the worst case each character becomes the new text."""
    _check_product(value, others[1:2])


def _check_format(text: str, values: Any, stars: bool | None = None) -> None:
    """Checks a format in which each field holds all values, or is as wide as they say. stars: values may be widths."""
    widths = sum(int(number) if len(number) < 20 else MAX_SIZE for number in _NUMBER.findall(text))
    field = _text_size(values)  # the longest one
    if "*" in text if stars is None else stars:
        given = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else (values,)
        field += sum(abs(value) for value in given if isinstance(value, int))
    _check(len(text) + widths + (text.count("%") + text.count("{")) * field)


_CHECKS: dict[str, Callable[[Any, tuple[Any, ...]], None]] = {"format": _check_format, "replace": _check_replace}


def _text_size(value: Any, left: int = MAX_SIZE) -> int:
    """Approximate characters of a value's text; counts up to `left`, because a value may contain itself."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    if not isinstance(value, Collection):
        return 1
    total = 2
    for item in value:
        if total > left:
            break
        total += _text_size(item, left - total)
    return total


def _check(size: int, limit: int | None = None) -> None:
    if size > (MAX_SIZE if limit is None else limit):
        raise TooLargeError(
            f"makes a text, list or number that is too large (over {MAX_SIZE >> 20} million characters)"
        )
