"""Templates that came with a model make nothing without bounds."""

from __future__ import annotations

import pytest

from fm9g.data.encode.template import Template, TemplateLimitError
from fm9g.errors import UserError

MESSAGES = [{"role": "user", "content": "a"}]


LONG = "{% set x = 'a' * 1000000 %}"


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 10**11 }}",
        "{% set n = 10**11 %}{{ [1] * n }}",
        "{{ 10**(10**9) }}",
        "{% set n = namespace(x=10) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ '%100000000000d' % 1 }}",
        "{{ '%*d' % (10**11, 1) }}",
        "{{ '%100000000000d' | format(1) }}",
        "{{ '{:100000000000d}'.format(1) }}",
        "{{ '{:{}d}'.format(1, 10**11) }}",
        "{{ ('{0:{1}}' * 1000).format(1, 10**7) }}",
        "{{ 'a' | center(10**11) }}",
        "{{ '' | center(10**11) }}",
        "{{ '' | indent(10**11) }}",
        "{{ ''.ljust(10**11) }}",
        "{{ 'a'.ljust(10**11) }}",
        "{{ 'a'.encode().ljust(10**11) }}",
        "{{ (1).to_bytes(10**11, 'big') }}",
        "{{ ['a'] | map('center', 10**11) | list }}",
        "{{ '\t'.expandtabs(10**11) }}",
        "{{ 'a\nb' | indent(10**11) }}",
        "{{ [1] | tojson(indent=10**11) }}",
        "{{ [1] | batch(10**11, 1) | list }}",
        "{% filter center(10**11) %}a{% endfilter %}",
        LONG + "{{ x.replace('a', x) }}",
        LONG + "{{ x | replace('a', x) }}",
        LONG + "{{ range(99999) | join(x) }}",
        LONG + "{{ x.join('a' * 99999) }}",
        LONG + "{% for i in range(99999) %}{{ x }}{% endfor %}",
    ],
)
def test_a_template_makes_no_text_without_bounds(text: str) -> None:
    with pytest.raises(
        TemplateLimitError, match=r"^chat template t(, line \d)?: makes a text, list or number that is too l"
    ):
        Template("t", text).render(MESSAGES)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{% for i in range(10**12) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ (" + "(" * 3000 + "1" + ")" * 3000 + ") }}", ""),
    ],
)
def test_python_and_jinja_have_bounds_of_their_own(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"chat template t.*{problem}"):
        Template("t", text).render(MESSAGES)


def test_bounds_do_not_change_what_templates_write() -> None:
    text = (
        "{{ '-' * 3 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ '%d of %5.1f%%' % (1700000000, 2.5) }}{{ 'a' ~ 1 ~ none ~ [1] }}"
        "{{ '{:>4}|{}'.format('a', 2) }}{{ 'a b'.replace(' ', '_') }}{{ messages | length }}{{ 'a\nb' | indent(2) }}"
        "{{ {'a': [1, true]} | tojson }}{{ ['a', 'b'] | join(', ') }}{{ nothing }}{{ 3 * 4 }}"
    )
    assert Template("t", text).render(MESSAGES) == (
        "---102431700000000 of   2.5%a1None[1]   a|2a_b1a\n  b" + '{"a": [1, true]}a, b12'
    )


@pytest.mark.parametrize(
    "text",
    [
        "{{ x.startswith(x) }}",
        "{{ x.split(x) | length }}",
        "{{ x.replace(x, '') }}",
        "{{ x | replace('<think>', '') }}",
        "{{ x | replace(x, '') }}",
        "{{ (guide ~ '{}').format(x) }}",
        "{{ (guide ~ '%s') % x }}",
        "{{ (guide ~ '%s') | format(x) }}",
        "{{ x | tojson }}",
        "{{ [x, x] | join('\\n\\n') }}",
    ],
)
def test_long_messages_are_within_bounds(text: str) -> None:
    """A reasoning of 500,000 characters, and 2,000 of a template's own."""
    begin = "{% set x, guide = 'a' * 500000, 'b' * 2000 %}"
    Template("t", begin + text).render(MESSAGES)
