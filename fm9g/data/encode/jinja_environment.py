"""Jinja as transformers configures it for chat templates; optionally with marks around generation blocks."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fm9g.errors import UserError

if TYPE_CHECKING:
    import jinja2
    from jinja2.parser import Parser

# Pairs of Unicode noncharacters, which no text contains by accident. They enclose a part of a rendered text.
MARK_START, MARK_END = "\ufdd0\ufdd2", "\ufdd1\ufdd2"


@lru_cache(maxsize=64)  # cached here, not in Template, so that a Template can be pickled
def compile_template(name: str, text: str, with_marks: bool) -> tuple[jinja2.Template, bool]:
    """Compiles a template; returns it, and whether it has generation blocks.

    with_marks: MARK_START and MARK_END enclose what generation blocks write. Raises UserError that names the line.
    """
    import jinja2

    try:
        environment = _environment(with_marks)
        literals = environment.parse(text).find_all(jinja2.nodes.TemplateData)
        template = environment.from_string(text)
        template.globals = dict(template.globals)  # Jinja's ChainMap would take half the time of a short rendering
        return template, any(literal.data == MARK_START for literal in literals)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template {name}, line {error.lineno}: {error.message}") from None
    except (SyntaxError, RecursionError, MemoryError) as error:  # from Python, to which Jinja compiles
        raise UserError(f"chat template {name}: {error}") from None


@lru_cache(maxsize=256)
def literal_text(text: str) -> str:
    """What a template itself writes: its literals and string constants, separated by null characters."""
    import jinja2

    tree = _environment(False).parse(text)
    literals = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    literals += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    return "\0".join(literals)


@lru_cache(maxsize=2)
def _environment(with_marks: bool) -> jinja2.Environment:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols

    from fm9g.data.encode.jinja_bounds import BoundedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if with_marks:
                start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (MARK_START, MARK_END))
                body = [start, *body, end]
            return nodes.Scope(body, lineno=line)  # variables set inside end with the block

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # Jinja's own tojson escapes HTML. The order of the arguments is part of the convention.
    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.bound_filters()
    environment.globals.update(raise_exception=raise_exception)
    return environment


def make_strftime_now(date: str) -> Any:
    """The function strftime_now of a template, for a fixed date (YYYY-MM-DD), or for now if `date` is empty."""

    def strftime_now(format: str) -> str:
        return (datetime.fromisoformat(date) if date else datetime.now()).strftime(format)

    return strftime_now
