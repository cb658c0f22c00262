"""Jinja2 for templates nobody trusts (called by `chat_template`).

On top of Jinja's immutable sandbox, which shuts off Python's internals, this bounds what a render
may cost: loop turns and macro calls, repetition, concatenation, padding, the length of the output.
It does not bound memory exactly: a template can still build some megabytes before it is stopped.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 100_000
"""Loop turns and macro calls in one render; the longest conversation accepted takes 10,000."""

MAX_CHARS = 4_000_000
"""Characters of any string a template builds, and of what it renders."""

MAX_INTEGER_BITS = 4096
PADDING_METHODS = {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"}
PADDING_FILTERS = ("center", "format", "indent", "wordwrap", "xmlattr")
WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{4}|\*)|\{[^}]*(\d{4}|\{)")
"""Widths over 999, or ones that are not written in the format itself: both kinds of format."""


class RaisedByTemplate(TemplateError):
    """The template called `raise_exception`: the conversation is not one it can write."""


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The environment chat templates are compiled and rendered in."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        """Make an environment with Hugging Face's settings and the globals its templates use."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        self._budget = threading.local()
        self.globals = {
            "range": self.globals["range"],
            "namespace": _GuardedNamespace,
            "dict": _make_dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters["tojson"] = _tojson
        for name in PADDING_FILTERS:
            self.filters.pop(name)

    def compile_bounded(self, source: str) -> Template:
        """Compile a template, with a step counted in every loop and macro.

        Raises:
            jinja2.TemplateSyntaxError: if it is not Jinja.
        """
        tree = _Bounder().visit(self.parse(source))
        tree.set_environment(self)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render_bounded(self, template: Template, variables: Mapping[str, Any]) -> str:
        """Render a template compiled here.

        Raises:
            RaisedByTemplate: if the template refuses the conversation.
            Exception: whatever else a template does wrong; SecurityError for going over a bound.
        """
        self._budget.steps = MAX_STEPS
        pieces: list[str] = []
        length = 0
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARS:
                raise SecurityError(f"it renders more than {MAX_CHARS} characters")
        return "".join(pieces)

    def count_step(self) -> str:
        """Count one loop turn or macro call of the render in progress; renders as nothing."""
        self._budget.steps -= 1
        if self._budget.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        return ""

    def concatenate(self, pieces: list[Any]) -> str:
        """Join what the template joins with `~`."""
        texts = [str(piece) for piece in pieces]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Shut off string methods that make long strings out of a number."""
        if isinstance(obj, str) and attr in PADDING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """Shut off `format` where it would pad widely; elsewhere it is Jinja's guarded one."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and WIDE_FORMAT.search(value.__self__):
            return None
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse the operators that make something huge out of something small."""
        if isinstance(left, int) and isinstance(right, int):
            _check_integer(operator, left, right)
        elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            size, count = (len(left), right) if hasattr(left, "__len__") else (len(right), left)
            _check_length(size * int(count))
        elif operator == "+" and hasattr(left, "__len__"):
            _check_length(len(left) + len(right))
        elif operator == "%" and isinstance(left, str) and WIDE_FORMAT.search(left):
            raise SecurityError("a format pads to more than 999 characters")
        return super().call_binop(context, operator, left, right)


class _Bounder(NodeTransformer):
    """Counts a step in every loop and macro, and makes `~` look at lengths."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._count(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._count(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._count(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenate", node.lineno, [nodes.List(node.nodes, lineno=node.lineno)])

    def _count(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.Output([_call("count_step", node.lineno, [])], lineno=node.lineno)
        node.body.insert(0, step)
        return node


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it is only its contents."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _GuardedNamespace(Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        for name in values:
            _check_stored_name(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_stored_name(name)
        super().__setitem__(name, value)


def _check_stored_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"{name!r} may not be stored in a namespace")


def _call(method: str, lineno: int, arguments: list[nodes.Expr]) -> nodes.Call:
    target = nodes.EnvironmentAttribute(method, lineno=lineno)
    return nodes.Call(target, arguments, [], None, None, lineno=lineno)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> Iterator[str]:
    raise RaisedByTemplate(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Hugging Face's filter: plain JSON, nothing escaped for HTML."""
    if indent is not None and indent > 64:
        raise SecurityError("tojson indents by more than 64")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _check_integer(operator: str, left: int, right: int) -> None:
    bits = left.bit_length() * abs(right) if operator == "**" else 0
    bits = left.bit_length() + right.bit_length() if operator == "*" else bits
    if bits > MAX_INTEGER_BITS:
        raise SecurityError(f"a number has more than {MAX_INTEGER_BITS} bits")


def _check_length(length: int) -> None:
    if length > MAX_CHARS:
        raise SecurityError(f"it builds a text or list longer than {MAX_CHARS}")
