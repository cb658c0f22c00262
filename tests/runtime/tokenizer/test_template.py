"""The sandbox: a checkpoint's template writes text, and can do nothing else."""

from __future__ import annotations

import time

import pytest

from mgvq_runtime.errors import RequestError, TokenizerError
from mgvq_runtime.tokenizer.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}]


def render(source: str) -> str:
    return ChatTemplate(source, {"eos_token": "</s>"}).render(MESSAGES, False)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0]['role'] }}{{ eos_token }}{{ undefined_thing }}", "user</s>"),
        ("{% for m in messages %}\n{{ m.content }}\n{% endfor %}", "hello\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{{ {'a': 'é<'} | tojson }}", '{"a": "é<"}'),
        ("{{ messages | tojson(indent=1) }}", '[\n {\n  "role": "user",\n  "content": "hello"\n }\n]'),  # noqa: E501
        ("{{ 'a' ~ 1 ~ none }}{{ 'ab' * 2 }}{{ 2 ** 3 }}{{ '%s!' % 'x' }}{{ '{:02d}'.format(3) }}", "a1Noneabab8x!03"),  # noqa: E501
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}{{ f('b') }}", "[1][b]"),
        ("{{ strftime_now('%Y') | length }}{{ dict(a=1).a }}", "41"),
        ("[{{ '{0.__class__}'.format(messages) }}{{ ''.__class__ }}]", "[]"),
        ("[{{ '{role.__class__}'.format_map(messages[0]) }}]", "[]"),
        ("{{ tools is none }}{{ add_generation_prompt }}", "TrueFalse"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ ','.join(messages | map(attribute='role')) }}", "a+buser"),  # noqa: E501
        ("{{ messages | join('', 'role') }}{{ 'aaa'.replace('a', 'b', 1) }}{{ 'aaa' | replace('a', 'b', 2) }}", "userbaabba"),  # noqa: E501
        ("{{ [3, 1] | sort | string }}{{ [[1], [2]] | sum(start=[]) }}{{ 1 in [1] and 1 < 2 <= 2 }}", "[1, 3][1, 2]True"),  # noqa: E501
        ("{{ messages[0].content.upper()[1:] | trim | replace('L', '-') }}", "E--O"),
    ],
)  # fmt: skip
def test_what_templates_use(source: str, text: str) -> None:
    assert render(source) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__class__.__base__() }}",
        "{{ messages[0]['content'].__init__.__globals__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ ''|attr('__class__')|attr('__base__')() }}",
        "{{ raise_exception.__globals__['os'].system('true') }}",
        "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context() }}",
        "{{ cycler.__init__.__globals__.os }}{{ cycler('a') }}",
        "{{ lipsum.__globals__ }}{{ lipsum() }}",
        "{{ namespace.__init__.__globals__.json.loads }}{{ namespace(__class__=1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages.clear() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ 1 // 0 }}",
        "{{ undefined_thing.x }}",
        "{{ undefined_thing() }}",
    ],
)
def test_what_the_sandbox_refuses(source: str) -> None:
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(TokenizerError, match="the checkpoint's chat template failed"):
        ChatTemplate(source).render(messages)
    assert messages == MESSAGES


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",  # noqa: E501
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10**10 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [0] * 10**10 }}",
        "{{ 9 ** 999999999 }}",
        "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",  # noqa: E501
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10**10) }}",
        "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",  # noqa: E501
        "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",  # noqa: E501
        "{% for i in range(9000) %}{{ 'abc' * 999 }}{% endfor %}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '%*d' % (10**10, 1) }}",
        "{{ messages | tojson(indent=10**9) }}",
        "{% set a = 'a' * 30000 %}{{ a.replace('a', a) | length }}",
        "{% set a = 'a' * 30000 %}{{ a | replace('a', a) | length }}",
        "{% set a = 'a' * 30000 %}{{ a.replace('', a) | length }}",
        "{% set a = 'a' * 10**6 %}{{ ([a] * 1000) | join | length }}",
        "{% set a = 'a' * 10**6 %}{{ ''.join([a] * 1000) | length }}",
        "{% set a = 'a' * 10**6 %}{{ ([a] * 1000) | map('trim') | join | length }}",
        "{{ ('a' * 10**6).join('b' * 1000) | length }}",
        "{{ ('b' * 1000) | join('a' * 10**6) | length }}",
        "{% set a = [[[0] * 1000] * 1000] * 100 %}{{ a | string | length }}",
        "{% set a = [[[0] * 1000] * 1000] * 100 %}{{ a | tojson | length }}",
        "{% set a = [[[0] * 1000] * 1000] * 100 %}{{ (a ~ '') | length }}",
        "{% set a = [[[0] * 1000] * 1000] * 100 %}{{ a }}",
        "{% set a = [[[0] * 1000] * 1000] * 100 %}{{ '%s' % (a,) }}",
        "{% set a = [[[0] * 1000] * 1000] * 100 %}{{ '{}'.format(a) }}",
        "{% set a = [[[0] * 1000] * 1000] * 100 %}{{ {1: a}.values() | upper }}",
        "{% set n = namespace(a=[0]) %}{% for i in range(40) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n }}",  # noqa: E501
        "{% set n = namespace(a=[0], b=[0]) %}{% for i in range(40) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",  # noqa: E501
        "{% set a = 'a' * 10**6 %}{{ ('%(a)s' * 10**5) % {'a': a} }}",
        "{% set a = 'a' * 10**6 %}{{ ('{0}' * 10**5).format(a) }}",
        "{{ ('a' * 30000).translate({97: 'a' * 30000}) }}",
        "{{ 'a'.encode().ljust(10**10) }}",
        "{{ (1).to_bytes(10**10) }}",
        "{% for i in range(90000) %}{% set a = 'a' * 4000000 %}{% endfor %}",
        "{% for i in range(90000) %}{% set a = [0] * 4000000 %}{% endfor %}",
    ],
)  # fmt: skip
def test_costs_are_bounded(source: str) -> None:
    start = time.process_time()
    with pytest.raises(TokenizerError):
        ChatTemplate(source).render(MESSAGES)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ 'a'|center(10**10) }}", "{{ 'a'|no_such_filter }}", "{% x %}", "{{" * 5000, "a" * 10**6 + "b", "{{ " + "1" * 5000 + " }}", "{{ 'a'|batch(10**10) }}"],  # noqa: E501
)  # fmt: skip
def test_what_is_no_template(source: str) -> None:
    with pytest.raises(TokenizerError, match=r"not valid Jinja|has over"):
        ChatTemplate(source)


def test_a_refusal_of_the_template_is_the_requests_fault() -> None:
    source = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('need a system') }}{% endif %}ok"
    )
    with pytest.raises(RequestError, match="refuses the conversation: need a system") as caught:
        render(source)
    assert caught.value.param == "messages"
    assert ChatTemplate(source).render([{"role": "system", "content": ""}]) == "ok"


def test_one_template_serves_many_threads() -> None:
    """The step budget belongs to the render, not to the template."""
    from concurrent.futures import ThreadPoolExecutor

    template = ChatTemplate("{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}")
    texts = [str(i) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda t: template.render([{"role": "user", "content": t}]), texts))
    assert replies == [text * 1000 for text in texts]
