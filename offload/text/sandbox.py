"""A jinja2 sandbox with a price on everything, for templates that come from strangers.

jinja2's immutable sandbox keeps a template from Python's internals. It does not keep one from
running for a year or filling the memory, so every rendering here is on the account of a `Meter`
(`meter.py`). What can make something larger than its inputs (`+ * ** %`, `~`, literals, blocks,
calls, filters) is charged before it allocates, and a tick is compiled into every loop. No thread,
signal or trace function is needed, so it works the same in any thread and beside a debugger.

Knows nothing of messages or models; `template.py` does. There is no loader: a template cannot read
another file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .meter import CONTAINERS, LimitExceeded, Meter

MAX_INT_BITS = 4096

# Left out: what reaches attributes (attr), pads (center, wordwrap, batch, slice), or serves HTML.
FILTERS = """abs capitalize count d default dictsort e escape first float format groupby indent int
    items join last length list lower map max min reject rejectattr replace reverse round safe
    select selectattr sort string sum title trim unique upper urlencode wordcount""".split()
PICKING_FILTERS = frozenset("d default first last max min safe".split())  # these make nothing new
STR_METHODS = frozenset(
    """capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal
    isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join lower lstrip
    partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split
    splitlines startswith strip swapcase title upper""".split()
)


class _TemplateNamespace(Namespace):
    """jinja2's namespace, without names that start with _ and with a repr of fixed size."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace holds no names that start with _: {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _GenerationBlocks(Extension):
    """`{% generation %}` marks what a model learns in training. Here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _MeterNodes(NodeTransformer):
    """Compiles the meter into what no environment can intercept: loops, `~` and literals."""

    def _call(self, name: str, args: list, line: int) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)
        call.set_lineno(line)
        return call

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        tick = nodes.ExprStmt(self._call("tick", [], node.lineno))
        node.body.insert(0, tick.set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return self._call("join_text", node.nodes, node.lineno)

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        is_target = getattr(node, "ctx", "load") != "load"  # {% for a, b in ... %}
        return node if constant or is_target else self._call("pay", [node], node.lineno)

    visit_List = visit_Tuple = visit_Dict = _literal


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox. `add_filter` and `globals` take what the caller adds to it.

    One environment may render in several threads at once: each thread has its own meter.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        # The optimiser would run constant expressions while compiling.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[LoopControls, _GenerationBlocks],
        )
        self._thread = threading.local()
        offered, self.filters = self.filters, {}
        for name in FILTERS:
            self.add_filter(name, offered[name], _PLANS.get(name), name not in PICKING_FILTERS)
        self.tests = {name: self._metered(test, None, False) for name, test in self.tests.items()}
        self.globals = {
            "range": self.globals["range"],  # the sandbox's own, at most 100,000 long
            "dict": self._metered(lambda *args, **kwargs: dict(*args, **kwargs), None, True),
            "namespace": _TemplateNamespace,
        }

    @property
    def meter(self) -> Meter:
        return self._thread.meter

    def on_account(self, meter: Meter, work: Callable[[], Any]) -> Any:
        """Run `work` (compiling or rendering) on the account of `meter`."""
        self._thread.meter = meter
        try:
            return work()
        finally:
            del self._thread.meter

    def add_filter(
        self, name: str, function: Callable, plan: Callable | None = None, makes: bool = True
    ) -> None:
        """`plan(meter, value, ...)` charges what the filter will make, and returns the value to
        filter. `makes`: the result is new, and is charged too."""
        self.filters[name] = self._metered(function, plan, makes)

    def _metered(self, function: Callable, plan: Callable | None, makes: bool) -> Callable:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # after the context

        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            meter = self.meter
            meter.tick()
            if plan is not None:
                value = plan(meter, *args[first:], **kwargs)
                args = (*args[:first], value, *args[first + 1 :])
            result = function(*args, **kwargs)
            return meter.pay(result) if makes else result

        return metered

    # What compiled templates call.

    def tick(self) -> None:
        self.meter.tick()

    def pay(self, value: Any) -> Any:
        self.meter.tick()
        return self.meter.pay(value)

    def join_text(self, *parts: Any) -> str:
        return "".join(map(str, self.meter.plan_join("", parts)))

    def concat(self, parts: Iterable[str]) -> str:
        meter, pieces, num_chars = self.meter, [], 0
        for part in parts:
            pieces.append(part)
            num_chars += len(part)
            if num_chars > meter.max_chars:
                break  # the charge below raises
        meter.charge(num_chars)
        return "".join(pieces)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = self.meter
        meter.tick()
        if operator == "%":
            if isinstance(left, str):
                meter.plan_format(left, right if isinstance(right, tuple) else (right,))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length()
            if operator == "**":
                bits = left.bit_length() * max(right, 1)
            if bits > MAX_INT_BITS:
                raise LimitExceeded("it computes with larger numbers than a chat template may")
        elif operator == "*":
            times = max(int(n) for n in (left, right, 1) if isinstance(n, int))
            meter.charge(times * max(meter.weigh(left), meter.weigh(right)))
        elif isinstance(left, str) and isinstance(right, str):
            meter.charge(len(left) + len(right))
        result = self.binop_table[operator](left, right)
        return meter.pay(result) if isinstance(result, CONTAINERS) else result

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # jinja2 would hand out an undefined value, which prints as nothing.
        raise SecurityError(f"a chat template may not reach {type(obj).__name__}.{attribute}")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = __self.meter
        meter.tick()
        # The sandbox wraps str.format; the method itself is one step further in.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if not isinstance(owner, str):
            return super().call(__context, __obj, *args, **kwargs)
        name = __obj.__name__
        if name not in STR_METHODS:
            raise SecurityError(f"a chat template may not call str.{name}")
        if name == "join" and len(args) == 1:
            args = (meter.plan_join(owner, args[0]),)
        elif name == "replace" and len(args) >= 2:
            meter.plan_replace(owner, args[0], args[1])
        elif name == "format":
            meter.plan_format(owner, (*args, *kwargs.values()))
        return meter.pay(super().call(__context, __obj, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _MeterNodes().visit(tree)
        tree.set_environment(self)
        return tree


# Filters that may make much of little: each is charged before it does.


def _plan_join(meter: Meter, value: Any, d: Any = "", *_: Any, **__: Any) -> list:
    return meter.plan_join(d, value)  # with attribute=, the items are charged whole


def _plan_replace(meter: Meter, value: Any, old: Any, new: Any, *_: Any, **__: Any) -> str:
    meter.plan_replace(str(value), str(old), str(new))
    return value


def _plan_indent(meter: Meter, value: Any, width: Any = 4, *_: Any, **__: Any) -> str:
    per_line = len(width) if isinstance(width, str) else int(width)
    meter.charge(len(str(value)) + max(per_line, 0) * (len(str(value).splitlines()) + 1))
    return value


def _plan_format(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> str:
    meter.plan_format(str(value), (*args, *kwargs.values()))
    return value


def _plan_sum(meter: Meter, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, (int, float)):  # adding up lists takes quadratic time
        raise LimitExceeded("it sums what are not numbers")
    return value


_PLANS: dict[str, Callable] = {
    "join": _plan_join,
    "replace": _plan_replace,
    "indent": _plan_indent,
    "format": _plan_format,
    "sum": _plan_sum,
}
