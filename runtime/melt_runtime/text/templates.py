"""Chat templates: programs of strangers, rendered as transformers renders them, in a bounded time and memory.

jinja2's sandbox keeps a template from reaching the machine. What it would do without end, or too large, is paid for
unit by unit from a budget that grows with the messages (``template_meter``): loops, macros and outputs by calls that
are put into the parsed template here, the rest where it is called.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateAssertionError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, pass_context
from jinja2.visitor import NodeTransformer

from melt_runtime.arguments import shown
from melt_runtime.errors import BundleError, TokenError
from melt_runtime.text.template_filters import FUNCTIONS, key_of, offered_filters, offered_tests
from melt_runtime.text.template_meter import CALL, NODE, STEP, WRITE, Meter, MeteredContext
from melt_runtime.text.template_values import TextFormat, contains, operate, prepare_method

MAX_TEMPLATE_BYTES = 1_000_000
_MAX_TOKENS = 30_000
"""Of Jinja; published templates have some thousand. Compiling takes a hundredth of a second for each hundred."""
_UNITS = 10_000_000  # about a second
_UNITS_PER_UNIT = 100  # of the messages: every character may be read and copied many times
ChatEnding = Literal["prompt", "none", "continue"]
"""How a chat ends: with the head of the answer, after its last message, or within it, to be continued."""
_MARK = "\U000ffffd "  # a character for private use, and a space that trimming takes away
_MAX_REASON = 500  # characters of an error that a template raises


class ChatTemplate:
    """A compiled template.

    Attributes:
        takes_parts: whether it reads messages whose content is a list of parts.
        takes_tools: whether it reads functions that may be called.
    """

    def __init__(self, source: str):
        """Compiles.

        Raises:
            BundleError: it is no template, or uses what chat templates do not have.
        """
        environment = _ChatEnvironment()
        try:
            tokens = (kind for _, kind, _ in environment.lex(source) if kind != "whitespace")
            if next(islice(tokens, _MAX_TOKENS, None), None) is not None:
                raise SecurityError(f"it has more than {_MAX_TOKENS} tokens")
            parsed = environment.parse(source)
            self.takes_parts = _reads(parsed, "text")
            self.takes_tools = any(node.name == "tools" for node in parsed.find_all(nodes.Name))
            self._template = environment.from_string(parsed)
        except Exception as error:  # jinja2's own, and what Python says of code that nests too deep
            raise BundleError(f"the chat template cannot be compiled: {_reason(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        ending: ChatEnding = "prompt",
    ) -> str:
        """The chat, as transformers renders it.

        Args:
            messages: plain values as JSON has them.
            tools: functions that may be called, the same.
            ending: how the text ends.

        Raises:
            TokenError: the template refuses the messages, fails, or works for too long; or the last message is to be
                continued and is no assistant's, or the template changes its text.
        """
        if ending == "continue":
            return _continued(self.render(_with_mark(messages), tools, "none"), _last_text(messages))
        variables = {
            "messages": messages,
            "add_generation_prompt": ending == "prompt",
            "tools": tools,
            "documents": None,
        }
        context = self._template.new_context(variables)
        assert isinstance(context, MeteredContext)
        try:
            context.meter = _budget([*messages, *(tools or ())])
            return "".join(self._template.root_render_func(context))
        except Exception as error:  # a template can fail in every way that Python can
            raise TokenError(f"the chat template refuses these messages: {_reason(error)}") from error


def _with_mark(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with a mark after the text of the last one."""
    last = messages[-1]
    content = last.get("content")
    place = f"messages[{len(messages) - 1}]"
    if last["role"] != "assistant":
        raise TokenError(f"{place}.role must be 'assistant' to be continued, got {shown(last['role'])}")
    if not content:
        raise TokenError(f"{place}.content must be text to be continued, got none")
    if isinstance(content, str):
        return [*messages[:-1], {**last, "content": content + _MARK}]
    part = {**content[-1], "text": content[-1]["text"] + _MARK}
    return [*messages[:-1], {**last, "content": [*content[:-1], part]}]


def _last_text(messages: Sequence[Mapping[str, Any]]) -> str:
    content = messages[-1]["content"]
    text: str = content if isinstance(content, str) else content[-1]["text"]
    return text.strip()


def _continued(rendered: str, text: str) -> str:
    """The text up to the mark; a template that trims its messages has taken the mark's space away.

    A template that leaves a part of the text out, as some do with thoughts, would have another text continued.
    """
    before, mark, after = rendered.rpartition(_MARK.rstrip())
    if not mark or not before.rstrip().endswith(text):
        left_out = "a part of its text" if mark else "its text"
        raise TokenError(
            f"the last message cannot be continued: the chat template leaves {left_out} out, or changes it; send it "
            "without what the template leaves out"
        )
    return before if after.startswith(_MARK[len(mark) :]) else before.rstrip()


def _budget(messages: Sequence[Mapping[str, Any]]) -> Meter:
    scale = Meter(1 << 62)
    scale.weigh(messages, WRITE)
    return Meter(_UNITS + _UNITS_PER_UNIT * ((1 << 62) - scale.left))


def _reason(error: Exception) -> str:
    """An error in words that can be printed: its text, with its kind where that is Python's."""
    text = str(error).encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) > _MAX_REASON:
        text = f"{text[:_MAX_REASON]}..."
    if isinstance(error, TemplateSyntaxError):
        return f"line {error.lineno}: {text}"
    return text if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: {text}"


def _reads(template: nodes.Template, name: str) -> bool:
    """Whether a template names an attribute or a key."""
    attributes = (node.attr == name for node in template.find_all(nodes.Getattr))
    return any(attributes) or any(node.value == name for node in template.find_all(nodes.Const))


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant said, for training; its body is rendered as a block of its own."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's form)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("render"), [], [], body).set_lineno(line)

    def render(self, caller: Macro) -> str:
        return caller()


class _ChatEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, metered."""

    context_class = MeteredContext
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        # Constants are not computed when the template is compiled, where no meter runs.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self.globals = dict(FUNCTIONS)
        self.filters = offered_filters(self.filters) | {_inner(name): pay for name, pay in _PAYING.items()}
        self.tests = offered_tests(self.tests)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for node in template.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            kind = type(node).__name__.lower()
            raise TemplateAssertionError(f"{kind}: there are no other templates to take in", node.lineno)
        metered = _Metering().visit(template)
        assert isinstance(metered, nodes.Template)
        return metered

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return operate(_meter(context), operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        owner, name = getattr(value, "__self__", None), getattr(value, "__name__", None)
        if type(owner) is str and name in ("format", "format_map"):
            return TextFormat(owner, name == "format_map")
        return None  # a Markup's is refused when it is called, as any method that is not offered

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter = _meter(context)
        meter.spend(CALL + len(args) + len(kwargs))
        if isinstance(function, TextFormat):
            return function.fill(self, meter, args, kwargs)
        owner = getattr(function, "__self__", None)
        if isinstance(function, LoopContext):
            args = tuple(meter.counted(items) for items in args)
        elif isinstance(owner, str | dict | list | tuple | float):
            args = prepare_method(meter, owner, function.__name__, args, kwargs)
        elif isinstance(owner, LoopContext):
            meter.weigh(args)
        elif not _is_offered(function, owner):
            name = getattr(function, "__name__", type(function).__name__)
            raise SecurityError(f"{name} is not offered to chat templates")
        return super().call(context, function, *args, **kwargs)


def _is_offered(function: Any, owner: Any) -> bool:
    return (
        isinstance(function, Macro | BlockReference | Joiner | Undefined)
        or isinstance(owner, Cycler | _Generation)
        or any(function is known for known in FUNCTIONS.values())
    )


def _meter(context: Context) -> Meter:
    assert isinstance(context, MeteredContext)
    return context.meter


class _Metering(NodeTransformer):
    """Puts what pays into a parsed template: filters whose names no template can write."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        cost = _cost(node.body)
        self.generic_visit(node)
        if node.test is not None:  # items that are left out reach no body
            node.iter = _pay("count", node.iter)
        node.body.insert(0, _turn(cost))
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        cost = _cost(node.body)
        self.generic_visit(node)
        node.body.insert(0, _turn(cost))
        return node

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [part if isinstance(part, nodes.TemplateData) else _pay("show", part) for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_pay("show", part) for part in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if len(node.ops) == 1 and node.ops[0].op in ("in", "notin"):
            found: nodes.Expr = _pay("contains", node.expr, node.ops[0].expr)
            return found if node.ops[0].op == "in" else nodes.Not(found)
        node.expr = _read_through(node.expr)
        for operand in node.ops:
            operand.expr = _read_through(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _pay("cut", node)
        node.arg = _read_through(node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _pay("key", node.key)
        return node


def _cost(body: Sequence[nodes.Node]) -> int:
    """Units of one turn through a body, all of its branches."""
    count = text = 0
    for statement in body:
        for node in (statement, *statement.find_all(nodes.Node)):
            count += 1
            text += len(node.data) if isinstance(node, nodes.TemplateData) else 0
    return STEP + NODE * count + (text >> WRITE)


def _inner(name: str) -> str:
    """A filter's name that no template can write, nor is it that of one that is kept hidden."""
    return f"-{name}"


def _pay(name: str, value: nodes.Node, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, _inner(name), list(arguments), [], None, None, lineno=value.lineno)


def _turn(cost: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_pay("spend", nodes.Const(cost, lineno=1)), lineno=1)


def _read_through(value: nodes.Expr) -> nodes.Expr:
    return value if isinstance(value, nodes.Const) else _pay("read", value)


@pass_context
def _spend(context: MeteredContext, units: int) -> None:
    context.meter.spend(units)


@pass_context
def _count(context: MeteredContext, items: Any) -> Any:
    return context.meter.counted(items)


@pass_context
def _read(context: MeteredContext, value: Any) -> Any:
    context.meter.weigh(value)
    return value


@pass_context
def _show(context: MeteredContext, value: Any) -> Any:
    context.meter.weigh(value, WRITE)
    return value


@pass_context
def _cut(context: MeteredContext, value: Any) -> Any:
    """What a slice made: no larger than what it was cut from."""
    context.meter.spend(1 + (len(value) >> WRITE if isinstance(value, str) else len(value)))
    return value


@pass_context
def _key(context: MeteredContext, key: Any) -> Any:
    return key_of(context.meter, key)


@pass_context
def _contains(context: MeteredContext, item: Any, group: Any) -> bool:
    return contains(context.meter, group, item)


_PAYING: dict[str, Any] = {
    "spend": _spend,
    "count": _count,
    "read": _read,
    "show": _show,
    "cut": _cut,
    "key": _key,
    "contains": _contains,
}
"""What ``_Metering`` puts into templates."""
