"""Run a chat template and record the origin of each part of its output.

A copy of the template's syntax tree is instrumented with a call at the start of each loop iteration and after each
loop. The calls record the output position and the current message of the loop, so that every character can be
attributed to a message. `{% generation %}` blocks are recorded as transformers records them.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from mlxflow.data.control_tokens import GENERATED_BEGIN, GENERATED_END, Stripper

#: The owner of a tool result inside an assistant's message.
ENVIRONMENT = -1

_LEFT = object()


class Trace:
    """A rendered text with the origin of its parts; all positions are in characters.

    Attributes:
        text: what the template wrote.
        blocks: its parts: each the value of one expression of the template, or the literal text between two.
        generated: (begin, end) of the `{% generation %}` blocks.
        literals: (begin, end) of control tokens inside a message.
        marks: (begin, end) of the contents of marked messages.
        marked_blocks: (begin, end) of the template's expressions whose values contain them.
    """

    def __init__(self, recorder: "_TraceRecorder", owners: Mapping[int, int]) -> None:
        self.blocks = recorder.stripper.blocks
        self.text = "".join(self.blocks)
        self.generated = recorder.stripper.generated
        self.literals = tuple(recorder.stripper.literals)
        self.marks = recorder.stripper.marks
        self.marked_blocks = recorder.marked_blocks
        self._entries = recorder.entries
        self._owners = owners

    @cached_property
    def segments(self) -> list[tuple[int, int, int | None]]:
        """Consecutive parts of the text: (begin, end, owner).

        The owner is the message number of the innermost loop, ENVIRONMENT, or None.
        """
        return list(_segments(self._entries, self._owners, len(self.text)))


class _Entry:
    """The start of a loop iteration, or the end of a loop."""

    __slots__ = ("at", "depth", "value")

    def __init__(self, at: int, depth: int, value: object) -> None:
        self.at, self.depth, self.value = at, depth, value


class _TraceRecorder:
    """Records the output blocks and loop positions while a template runs."""

    def __init__(self) -> None:
        self.stripper = Stripper()
        self.entries: list[_Entry] = []
        self.marked_blocks: list[tuple[int, int]] = []

    def add(self, block: str) -> None:
        """Record an output block."""
        begin = self.stripper.position
        if self.stripper.add(block):
            self.marked_blocks.append((begin, self.stripper.position))

    def read(self, message: object) -> None:
        """Record that the template read a message by index; the first one in a loop iteration counts."""
        if self.entries and type(self.entries[-1].value) is int:
            self.entries[-1].value = message


class _Messages(list[Any]):
    """The list of messages; records which one a template reads by index."""

    recorder: _TraceRecorder

    @classmethod
    def of(cls, messages: Sequence[Any], recorder: _TraceRecorder) -> "_Messages":
        traced = cls(messages)
        traced.recorder = recorder
        return traced

    def __getitem__(self, key: Any) -> Any:  # an index or a slice
        message = super().__getitem__(key)
        if isinstance(key, slice):
            return _Messages.of(message, self.recorder)
        self.recorder.read(message)
        return message


class _EntryNoter:
    """The function called by instrumented templates; it records an entry for the template run of the current thread."""

    def __init__(self) -> None:
        self.local = threading.local()

    def __call__(self, depth: int, value: object = _LEFT) -> None:
        recorder = self.local.recorder
        recorder.entries.append(_Entry(recorder.stripper.position, depth, value))


class TracingEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox that calls the instrumentation directly, for speed."""

    def call(self, context: jinja2.runtime.Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function for a template."""
        return called(*args) if type(called) is _EntryNoter else super().call(context, called, *args, **kwargs)


class TracingExtension(jinja2.ext.Extension):
    """A Jinja extension with `{% generation %}` and the calls that `instrumented` adds."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.note = _EntryNoter()

    @classmethod
    def of(cls, environment: jinja2.Environment) -> "TracingExtension":
        """Return this extension of an environment."""
        extension: Any = environment.extensions[cls.identifier]
        return cast("TracingExtension", extension)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parse a `{% generation %}` block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_generation"), [], [], body).set_lineno(line)

    def _generation(self, caller: jinja2.runtime.Macro) -> str:
        """Return the output of a block in a plain template or inside a captured block."""
        text = caller()
        recorder = getattr(self.note.local, "recorder", None)
        if recorder is not None:
            begin = recorder.stripper.position
            recorder.stripper.generated.append((begin, begin + recorder.stripper.length(text)))
        return text

    def instrumented(self, template: jinja2.nodes.Template) -> jinja2.nodes.Template:
        """Instrument a syntax tree in place and return it."""
        template.body = self._instrumented(template.body, 0)
        template.set_environment(self.environment)
        return template

    def _instrumented(self, nodes: list[jinja2.nodes.Node], depth: int) -> list[jinja2.nodes.Node]:
        """Return statements with the calls added, except inside macros and captured blocks."""
        statements: list[jinja2.nodes.Node] = []
        for node in nodes:
            if isinstance(node, jinja2.nodes.CallBlock) and self._is_generation(node):
                body = self._instrumented(node.body, depth)
                node = jinja2.nodes.Scope([_written(GENERATED_BEGIN), *body, _written(GENERATED_END)]).set_lineno(
                    node.lineno
                )
            elif isinstance(node, jinja2.nodes.If):
                node.body = self._instrumented(node.body, depth)
                node.else_ = self._instrumented(node.else_, depth)
                self._instrumented(list(node.elif_), depth)
            elif isinstance(node, jinja2.nodes.With | jinja2.nodes.Scope):
                node.body = self._instrumented(node.body, depth)
            statements.append(node)
            if isinstance(node, jinja2.nodes.For) and not node.recursive:
                target = node.target.name if isinstance(node.target, jinja2.nodes.Name) else None
                value = jinja2.nodes.Name(target, "load") if target else jinja2.nodes.Const(None)
                begin = self._noted(node.lineno, jinja2.nodes.Const(depth), value)
                node.body = [begin, *self._instrumented(node.body, depth + 1)]
                node.else_ = self._instrumented(node.else_, depth)
                statements.append(self._noted(node.lineno, jinja2.nodes.Const(depth)))
        return statements

    def _is_generation(self, node: jinja2.nodes.CallBlock) -> bool:
        called = node.call.node
        return isinstance(called, jinja2.nodes.ExtensionAttribute) and called.identifier == self.identifier

    def _noted(self, line: int, *arguments: jinja2.nodes.Expr) -> jinja2.nodes.Node:
        return jinja2.nodes.ExprStmt(self.call_method("note", list(arguments))).set_lineno(line)

    def trace(
        self,
        template: jinja2.Template,
        messages: Sequence[Mapping[str, Any]],
        environment_values: Sequence[object],
        variables: Mapping[str, Any],
        *,
        origins: bool,
    ) -> Trace:
        """Run an instrumented template.

        Args:
            template: the template.
            messages: distinct objects.
            environment_values: parts of messages written by tools.
            variables: the other variables of the template.
            origins: whether to record segments.
        """
        recorder = self.note.local.recorder = _TraceRecorder()
        try:
            context = template.new_context({"messages": _Messages.of(messages, recorder), **variables})
            blocks = template.root_render_func(context)
            for block in blocks if origins else ["".join(blocks)]:
                recorder.add(block)
        finally:
            del self.note.local.recorder
        owners = {id(value): ENVIRONMENT for value in environment_values}
        owners |= {id(message): number for number, message in enumerate(messages)}
        return Trace(recorder, owners)


def _written(text: str) -> jinja2.nodes.Node:
    return jinja2.nodes.Output([jinja2.nodes.TemplateData(text)])


def _segments(
    entries: Sequence[_Entry], owners: Mapping[int, int], length: int
) -> Iterator[tuple[int, int, int | None]]:
    """Yield the parts of a text, each with the message of the innermost loop that has one."""
    stack: list[tuple[int, int | None]] = []  # depth and owner of each current iteration
    begin = 0
    for entry in entries:
        if entry.at > begin:
            yield begin, entry.at, stack[-1][1] if stack else None
            begin = entry.at
        while stack and stack[-1][0] >= entry.depth:
            stack.pop()
        if entry.value is not _LEFT:
            outer = stack[-1][1] if stack else None
            stack.append((entry.depth, owners.get(id(entry.value), outer)))
    if length > begin:
        yield begin, length, None
