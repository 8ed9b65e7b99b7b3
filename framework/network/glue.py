"""What stands between a network's modules: additions, reshapes, class tokens, modules with more than one input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from framework.network.packing import columns, of_one_image, pack, unpack
from framework.network.records import Node, Trace
from framework.network.values import BATCH, Computed, Given, Like, Own, Size, TracedInt, Value, leaves, mapped
from framework.runtime.errors import UserError


class Calls:
    """Recorded calls as a function of a network and one input; can be copied and pickled.

    Args:
        graph: the calls.
        size: what one input must have as shape, where the calls hold for that alone.
    """

    def __init__(self, graph: fx.Graph, size: tuple[int, ...] | None = None) -> None:
        self.graph, self.size = graph, size
        self.paths = tuple(dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module"))
        self.own = tuple(dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "get_attr"))
        self._function: Callable[[nn.Module, Tensor], Tensor] | None = None

    def __call__(self, root: nn.Module, x: Tensor) -> Tensor:
        """(N, ...) -> (N, ...), on the modules and tensors that ``root`` has under the names of the calls.

        Raises:
            UserError: the images have another size than those that the network was cut for.
        """
        if self.size is not None and tuple(x.shape[1:]) != self.size:
            raise UserError(
                f"{type(root).__name__} was cut for images of one size: a segment got {tuple(x.shape[1:])} in place "
                f"of {self.size}"
            )
        self.prepare(root)
        assert self._function is not None
        return self._function(root, x)

    def prepare(self, root: nn.Module) -> None:
        """Make the function, which ``torch.compile`` can't do."""
        if self._function is None:
            self._function = type(fx.GraphModule(root, self.graph)).forward  # finds all in its first argument

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calls) and (str(self.graph), self.size) == (str(other.graph), other.size)

    def __hash__(self) -> int:
        return hash((self.paths, self.own, self.size))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_function": None}

    def __repr__(self) -> str:
        return f"Calls({', '.join((*self.paths, *self.own))})"


class Glue(nn.Module):
    """Calls as a module, on the modules and parameters of ``root`` as they are.

    It registers nothing of ``root``: state dicts have everything once, and a child that is replaced is replaced here.
    """

    def __init__(self, root: nn.Module, calls: Calls) -> None:
        super().__init__()
        self._root, self._calls = (root,), calls  # a tuple is not registered
        calls.prepare(root)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, ...)."""
        return self._calls(self._root[0], x)


def build(
    trace: Trace,
    nodes: Sequence[Node],
    given: Sequence[Value],
    wanted: Sequence[Value],
    makers: Mapping[int, Node],
) -> Calls:
    """Calls as a function of one tensor, with several packed into one.

    Args:
        trace: where the calls were recorded.
        nodes: the calls that depend on the images.
        given: the tensors that go in.
        wanted: the tensors that come out.
        makers: what made each tensor that does not depend on the images.
    """
    writer = _Writer(trace, given, makers)
    for node in nodes:
        writer.write(node)
    writer.finish(wanted)
    return Calls(writer.graph, writer.size)


class _Writer:
    """Writes calls into a graph."""

    def __init__(self, trace: Trace, given: Sequence[Value], makers: Mapping[int, Node]) -> None:
        self.graph = fx.Graph()
        self.trace, self.makers = trace, makers
        self.input = self.graph.placeholder("x")
        shapes = [trace.shapes[value.number] for value in given]
        self.batch, *sizes = shapes[0] if len(given) == 1 else (BATCH, columns(shapes)[-1])
        self.sizes = tuple(sizes)
        self.known: dict[int, fx.Node] = {given[0].number: self.input}
        self.owned: dict[str, fx.Node] = {}
        self.fixed = len(given) > 1
        if len(given) > 1:
            for value, begin, shape in zip(given, columns(shapes), shapes, strict=False):
                arguments = (self.input, begin, of_one_image(shape))
                self.known[value.number] = self.graph.call_function(unpack, arguments)

    @property
    def size(self) -> tuple[int, ...] | None:
        """What one input must have as shape, where the calls hold for that alone."""
        return self.sizes if self.fixed else None

    def finish(self, wanted: Sequence[Value]) -> None:
        """The graph returns these tensors."""
        made = [self.known[value.number] for value in wanted]
        rows = [of_one_image(self.trace.shapes[value.number])[0] for value in wanted]
        self.graph.output(made[0] if len(made) == 1 else self.graph.call_function(pack, (made, rows)))

    def write(self, node: Node) -> None:
        """One call, and first what it needs besides the images."""
        args, kwargs = mapped(self._argument, node.args), mapped(self._argument, node.kwargs)
        if node.kind == "module":
            made = self.graph.call_module(node.target, args, kwargs)
        elif node.kind == "method":
            made = self.graph.call_method(node.target, args, kwargs)
        elif node.kind == "attribute":
            made = self.graph.call_function(getattr, (args[0], node.target))
        else:
            made = self.graph.call_function(node.target, args, kwargs)
        self._unpack(made, node.output)

    def _unpack(self, made: fx.Node, output: Any) -> None:
        if isinstance(output, Value):
            self.known[output.number] = made
            return
        items = output.items() if isinstance(output, dict) else enumerate(output) if _is_list(output) else ()
        for key, item in items:
            if any(isinstance(leaf, Value) for leaf in leaves(item)):
                self._unpack(self.graph.call_function(_item, (made, key)), item)

    def _argument(self, leaf: Any) -> Any:
        if isinstance(leaf, Value):
            if leaf.number not in self.known:
                self.write(self.makers[leaf.number])
            return self.known[leaf.number]
        if isinstance(leaf, Own):
            if leaf.name not in self.owned:
                self.owned[leaf.name] = self.graph.create_node("get_attr", leaf.name)
            return self.owned[leaf.name]
        if isinstance(leaf, torch.device):  # that of the recording
            return self.graph.call_function(getattr, (self.input, "device"))
        if isinstance(leaf, Like):
            return self.graph.call_function(
                getattr, (self.known.get(leaf.value.number, self.input), leaf.attribute)
            )
        return self._number(leaf) if isinstance(leaf, TracedInt) else leaf

    def _number(self, number: TracedInt) -> Any:
        source = number.source
        if isinstance(source, Size) and source.value.number in self.known:
            return self.graph.call_method("size", (self.known[source.value.number], source.dimension))
        if isinstance(source, Computed):
            arguments = [self._number(a) if isinstance(a, TracedInt) else a for a in source.arguments]
            if all(isinstance(a, int) for a in arguments):
                return int(number)
            return self.graph.call_function(source.function, tuple(arguments))
        if number % BATCH == 0 and number and self.batch % BATCH == 0:
            images = self.graph.call_method("size", (self.input, 0))
            images = (
                images
                if self.batch == BATCH
                else self.graph.call_function(_divide, (images, self.batch // BATCH))
            )
            return images if number == BATCH else self.graph.call_function(_times, (images, number // BATCH))
        image_dependent = isinstance(source, Given) or source.value.number in self.trace.dependent
        self.fixed = self.fixed or image_dependent
        return int(number)


def _item(made: Any, key: Any) -> Any:
    return made[key]


def _divide(a: int, b: int) -> int:
    return a // b


def _times(a: int, b: int) -> int:
    return a * b


def _is_list(tree: Any) -> bool:
    return isinstance(tree, list | tuple)
