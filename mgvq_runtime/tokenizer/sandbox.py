"""Jinja2 for templates nobody trusts (called by `chat_template`).

On top of Jinja's immutable sandbox, which shuts off Python's internals, this bounds what a render
may cost: loop turns and macro calls, whatever makes long texts out of short ones, lists within
lists that are written or compared, the length of the output. What there is to spend is `budget`'s.
It does not bound memory exactly: a template can still build some hundred megabytes before it is
stopped.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from mgvq_runtime.tokenizer.budget import ELEMENT_WORK, MAX_CHARS, Budget

MAX_INTEGER_BITS = 4096
PADDING_METHODS = {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"}
SHUT_OFF_METHODS = PADDING_METHODS | {"translate", "encode", "to_bytes"}
"""`bytes` have the same methods as texts once more, and nobody to watch them."""

SPLITTING_METHODS = {"split", "rsplit", "splitlines"}
SPLITTING_WORK = 16
"""For each character of the text: every second one may become a text of its own."""

PADDING_FILTERS = ("center", "format", "indent", "wordwrap", "xmlattr")
SHUT_OFF_FILTERS = (*PADDING_FILTERS, "batch", "slice", "urlencode", "urlize")
MEASURED_FILTERS = (
    "capitalize", "dictsort", "e", "escape", "float", "forceescape", "groupby", "int", "lower",
    "max", "min", "pprint", "safe", "sort", "string", "striptags", "sum", "title", "trim",
    "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
"""Those that write a value as text, or look into the lists it consists of."""

COMPARING_TESTS = (
    "==", "eq", "equalto", "!=", "ne", "in", "<", "lt", ">", "gt", "<=", "le", ">=", "ge",
)  # fmt: skip
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
            finalize=self._finalized,
        )
        self._budget = Budget()
        self.globals = {
            "range": self.globals["range"],
            "namespace": _GuardedNamespace,
            "dict": _make_dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        for name in SHUT_OFF_FILTERS:
            self.filters.pop(name)
        for name in MEASURED_FILTERS:
            self.filters[name] = self._measuring(self.filters[name])
        for name in COMPARING_TESTS:
            self.tests[name] = self._measuring(self.tests[name], is_written=False)
        self.filters |= {"tojson": self._tojson, "join": self._join, "replace": self._replace}

    def compile_bounded(
        self, source: str, exchange: Callable[[str], str] | None = None
    ) -> Template:
        """Compile a template, with a step counted in every loop and macro.

        Args:
            source: Jinja.
            exchange: What becomes of each text that is written in it.

        Raises:
            jinja2.TemplateSyntaxError: if it is not Jinja.
        """
        self._budget.refill()  # Jinja runs filters of constants while it compiles
        tree = _Bounder(exchange).visit(self.parse(source))
        tree.set_environment(self)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render_bounded(self, template: Template, variables: Mapping[str, Any]) -> str:
        """Render a template compiled here.

        Raises:
            RaisedByTemplate: if the template refuses the conversation.
            Exception: whatever else a template does wrong; SecurityError for going over a bound.
        """
        self._budget.refill()
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
        self._budget.count_step()
        return ""

    def measured(self, value: Any, is_written: bool = True) -> Any:
        """Return a value that is about to be written or compared, if it is not too long."""
        self._budget.measure(value, is_written)
        return value

    def compared(self, value: Any) -> Any:
        """Return one side of a comparison."""
        return self.measured(value, is_written=False)

    def concatenate(self, pieces: list[Any]) -> str:
        """Join what the template joins with `~`."""
        return self._joined("", pieces)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what the template calls; a method of a text is paid for first."""
        text = getattr(obj, "__self__", None)
        if isinstance(text, str):
            name = obj.__name__
            if name == "join" and len(args) == 1:
                args = (list(args[0]),)  # what is made one by one can be looked at only once
                self._check_join(text, args[0])
            elif name == "replace" and len(args) in (2, 3):
                self._check_replace(text, *args)
            self._budget.take(len(text), SPLITTING_WORK if name in SPLITTING_METHODS else 1)
        return super().call(context, obj, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Shut off methods that make long texts out of a number, or what is not watched."""
        if isinstance(obj, str | int) and attr in SHUT_OFF_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """Shut off `format` where it would pad widely; elsewhere it is Jinja's guarded one."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None or WIDE_FORMAT.search(value.__self__):
            return None

        @functools.wraps(wrapped)
        def write(*args: Any, **kwargs: Any) -> str:
            self._check_format(value.__self__, "{", [args, kwargs])
            return str(wrapped(*args, **kwargs))

        return write

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse the operators that make something huge out of something small."""
        if isinstance(left, int) and isinstance(right, int):
            _check_integer(operator, left, right)
        elif operator == "*" and (hasattr(left, "__len__") or hasattr(right, "__len__")):
            whole, count = (left, right) if hasattr(left, "__len__") else (right, left)
            self._take(whole, len(whole) * int(count))
        elif operator == "+" and hasattr(left, "__len__"):
            self._take(left, len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            if WIDE_FORMAT.search(left):
                raise SecurityError("a format pads to more than 999 characters")
            self._check_format(left, "%", right)
        return super().call_binop(context, operator, left, right)

    def _finalized(self, value: Any) -> Any:
        """Look at what is about to be put out; the texts are counted in `render_bounded`."""
        return value if isinstance(value, str) else self.measured(value)

    def _take(self, like: Any, length: int) -> None:
        self._budget.take(length, 1 if isinstance(like, str) else ELEMENT_WORK)

    def _check_format(self, text: str, mark: str, values: Any) -> None:
        self._budget.take(len(text) + text.count(mark) * self._budget.measure(values))

    def _check_join(self, separator: str, texts: Sequence[Any]) -> None:
        length = sum(len(text) for text in texts if isinstance(text, str))
        self._budget.take(length + len(separator) * len(texts))

    def _check_replace(self, text: str, old: str, new: str, count: int = -1) -> None:
        hits = text.count(old) if count < 0 else min(text.count(old), count)
        self._budget.take(len(text) + hits * max(len(new) - len(old), 0))

    def _text(self, value: Any) -> str:
        return str(self.measured(value))

    def _joined(self, separator: str, values: Iterable[Any]) -> str:
        texts = [self._text(value) for value in values]
        self._check_join(separator, texts)
        return separator.join(texts)

    def _join(self, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
        """Jinja's filter `join`, measured."""
        values = value if attribute is None else map(make_attrgetter(self, attribute), value)
        return self._joined(self._text(d), values)

    def _replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        """Jinja's filter `replace`, measured."""
        text, old, new = self._text(s), self._text(old), self._text(new)
        most = -1 if count is None else count
        self._check_replace(text, old, new, most)
        return text.replace(old, new, most)

    def _measuring(self, function: Any, is_written: bool = True) -> Callable[..., Any]:
        """Return a filter or test that looks at its arguments before it begins."""
        place = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def measuring(*args: Any, **kwargs: Any) -> Any:
            values = [list(v) if isinstance(v, Iterator) else v for v in args[place:]]
            self._budget.measure([*values, *kwargs.values()], is_written)
            return function(*args[:place], *values, **kwargs)

        return measuring

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Hugging Face's filter: plain JSON, nothing escaped for HTML."""
        if indent is not None and indent > 64:
            raise SecurityError("tojson indents by more than 64")
        self._budget.measure([value, separators])
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        pieces: list[str] = []
        length = 0
        for piece in encoder.iterencode(value):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_CHARS:
                break
        self._budget.take(length)
        return "".join(pieces)


class _Bounder(NodeTransformer):
    """Counts a step in every loop and macro, and makes `~` and comparisons look at lengths."""

    def __init__(self, exchange: Callable[[str], str] | None) -> None:
        self._exchange = exchange

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        if self._exchange is not None:
            node.data = self._exchange(node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if self._exchange is not None and isinstance(node.value, str):
            node.value = self._exchange(node.value)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._count(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._count(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._count(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenate", node.lineno, [nodes.List(node.nodes, lineno=node.lineno)])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides: list[Any] = [node, *node.ops]
        if len(sides) == 2 and any(isinstance(side.expr, nodes.Const) for side in sides):
            return node  # one word or number: no list is looked into
        for side in sides:
            side.expr = _call("compared", side.expr.lineno, [side.expr])
        return node

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


def _check_integer(operator: str, left: int, right: int) -> None:
    bits = left.bit_length() * abs(right) if operator == "**" else 0
    bits = left.bit_length() + right.bit_length() if operator == "*" else bits
    if bits > MAX_INTEGER_BITS:
        raise SecurityError(f"a number has more than {MAX_INTEGER_BITS} bits")
