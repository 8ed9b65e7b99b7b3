"""Record what a network computes, call by call, without computing it.

The network's code runs once on tensors of the device ``meta``, which have a shape and no memory. Child modules are
recorded as they are called; what stands between them (additions, reshapes, class tokens) is recorded as calls of
PyTorch's functions.
Sizes that the code reads off tensors stay expressions of these tensors, so that what was recorded serves any batch.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from framework.network.records import Node, Trace
from framework.network.values import BATCH, Given, Like, Own, Size, TracedInt, Value, leaves, mapped


class Untraceable(Exception):
    """Says why the network can't be recorded."""


def trace(
    network: nn.Module,
    run: Callable[[nn.Module, Tensor], Any],
    shape: tuple[int, ...],
    training: bool,
    opened: Callable[[str, nn.Module], bool],
) -> Trace:
    """Record what ``run(network, images)`` computes; the network stays as it is.

    Args:
        network: whose calls are recorded.
        run: calls the network, or a method of it.
        shape: of one image (C, H, W).
        training: training mode, or evaluation mode.
        opened: whether the calls inside a module of this name are recorded, too.

    Raises:
        Untraceable: the result is not one tensor, or the code looks at the tensors' values, draws random numbers that
            are not PyTorch's, or sets the network's buffers anew.
    """
    skeleton = _skeleton(network).train(training)
    recorder = _Recorder(skeleton, opened)
    with torch.device("meta"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        images = torch.empty(BATCH, *shape)
        image = recorder.number(images)
        recorder.dependent.add(image.number)
        try:
            with recorder.calls(), recorder, _nothing_drawn():
                output = run(skeleton, images)
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable(
                str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            ) from error
    return recorder.finish(image, output)


def _skeleton(network: nn.Module) -> nn.Module:
    """A copy of the network without memory."""
    memo: dict[int, Any] = {}
    for module in network.modules():
        for tensor in _tensors(module).values():
            memo.setdefault(id(tensor), torch.empty_like(tensor, device="meta"))
    return copy.deepcopy(network, memo)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and other tensors of a module alone, by name."""
    everything = {**vars(module), **module._parameters, **module._buffers}
    return {name: tensor for name, tensor in everything.items() if isinstance(tensor, Tensor)}


def _states() -> tuple[Any, ...]:
    """Of Python's and NumPy's random numbers."""
    return random.getstate(), np.random.get_state()


@contextmanager
def _drawn_again() -> Iterator[None]:
    """What is drawn within the context is drawn again after it."""
    python, numpy = _states()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Fails where something is drawn: what it decides would be decided once for ever."""
    before = repr(_states())
    with _drawn_again():
        yield
        if repr(_states()) != before:
            raise Untraceable("its code draws random numbers of Python or NumPy; use PyTorch's")


class _Recorder(TorchFunctionMode):
    """Writes down the calls of modules and functions while it is active."""

    def __init__(self, network: nn.Module, opened: Callable[[str, nn.Module], bool]) -> None:
        super().__init__()
        self.opened = opened
        self.paths = {module: path for path, module in reversed(list(network.named_modules()))}
        self.own: dict[int, str] = {}
        for path, module in network.named_modules():
            for name, tensor in _tensors(module).items():
                self.own.setdefault(id(tensor), f"{path}.{name}".lstrip("."))
        self.recorded = {
            network: dict(network._buffers)
        }  # modules whose own code is, with their buffers before
        self.nodes: list[Node] = []
        self.dependent: set[int] = set()
        self.tensors: list[
            tuple[Tensor, int]
        ] = []  # with their versions; keeps them, so that ids stay theirs
        self.numbers: dict[int, int] = {}
        self.likes: dict[Any, Like] = {}
        self.quiet = False

    def number(self, tensor: Tensor) -> Value:
        """A new number for a tensor."""
        self.numbers[id(tensor)] = len(self.tensors)
        self.tensors.append((tensor, tensor._version))
        return Value(len(self.tensors) - 1)

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Within the context, calls of the network's modules come here."""
        usual = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.quiet or module not in self.paths or not self.paths[module]:
                return usual(module, *args, **kwargs)
            return self._module(module, partial(usual, module), args, kwargs)

        with mock.patch.object(nn.Module, "__call__", call):
            yield

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.quiet:
            if func is nn.functional.batch_norm:  # its own shape function takes most of the time of a trace
                return torch.empty_like(args[0])
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        before = self._template((args, kwargs))
        versions = [(leaf, leaf._version) for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*_plain(args), **_plain(kwargs))
        changed = [tensor for tensor, version in versions if tensor._version != version]
        if name in ("size", "numel") and args and isinstance(args[0], Tensor):
            return self._sizes(func, args, kwargs, result)
        if not changed and not any(isinstance(leaf, Tensor) for leaf in leaves(result)):
            return result
        owner = getattr(func, "__objclass__", None) or torch.Tensor
        is_method = getattr(owner, "__name__", "") in ("TensorBase", "Tensor") and (
            getattr(torch.Tensor, name, None) is func or getattr(func, "__objclass__", None) is not None
        )
        node = Node("method", name) if is_method else Node("function", func)
        own_changed = any(id(tensor) in self.own for tensor in changed)
        return self._record(node, before, result, in_order=own_changed)

    def _attribute(self, getter: Any, args: tuple[Any, ...]) -> Any:
        """What ``tensor.NAME`` is."""
        name = getattr(getter.__self__, "__name__", None) or getter.__self__.fget.__name__
        result, tensor = getter(*args), args[0]
        if name == "shape":
            return self._sizes(torch.Tensor.size, args, {}, result)
        if name in ("dtype", "device") and id(tensor) in self.numbers:
            self.likes[result] = Like(Value(self.numbers[id(tensor)]), name)
        if isinstance(result, Tensor):
            return self._record(Node("attribute", name), self._template((args, {})), result)
        return result

    def _sizes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        tensor = args[0]
        if id(tensor) not in self.numbers:
            return result
        value = Value(self.numbers[id(tensor)])
        sizes = (
            [TracedInt.of(size, Size(value, d)) for d, size in enumerate(tensor.size())]
            if not self.quiet
            else []
        )
        if func.__name__ == "numel":
            product = sizes[0] if sizes else result
            for size in sizes[1:]:
                product = product * size
            return product
        if isinstance(result, int):
            dimension = args[1] if len(args) > 1 else kwargs["dim"]
            return sizes[dimension]
        return torch.Size(sizes)

    def _module(
        self, module: nn.Module, usual: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        node, before = Node("module", self.paths[module]), self._template((args, kwargs))
        first = len(self.tensors)
        if self.opened(node.target, module):
            outer, self.nodes = self.nodes, []
            self.recorded.setdefault(module, dict(module._buffers))
            result = usual(*args, **kwargs)
            node.inner, self.nodes = self.nodes, outer
        else:
            self.quiet = True
            try:
                with _drawn_again():
                    result = usual(*_plain(args), **_plain(kwargs))
            finally:
                self.quiet = False
            first = len(self.tensors)
        return self._record(node, before, result, first)

    def _record(
        self, node: Node, before: Any, result: Any, first: int | None = None, in_order: bool = False
    ) -> Any:
        """Write down a call.

        Args:
            node: for it.
            before: its arguments.
            result: what it returned.
            first: the lowest number that its own calls gave.
            in_order: it must run once and in its place, like those that depend on the images.
        """
        node.args, node.kwargs = before

        def output(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            known = self.numbers.get(id(leaf))
            if known is not None and first is not None and known >= first:
                return Value(known)
            return self.number(leaf)

        result = mapped(lambda x: TracedInt.of(x, Given(x)) if type(x) is int else x, result)
        made = len(self.tensors)
        node.output = mapped(output, result)
        node.dependent = in_order or any(number in self.dependent for number in node.uses)
        if node.dependent:  # of what the calls inside it made, these have told
            self.dependent.update(number for number in node.defines if number >= made)
        self.nodes.append(node)
        return result

    def _template(self, tree: Any) -> Any:
        """Arguments as they were before a call, which may change them."""

        def written(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                if id(leaf) in self.own and id(leaf) not in self.numbers:
                    return Own(self.own[id(leaf)])
                if id(leaf) not in self.numbers:
                    raise Untraceable(
                        "its code uses a tensor that is neither an argument nor the network's own"
                    )
                number = self.numbers[id(leaf)]
                if number not in self.dependent and self.tensors[number][1] != leaf._version:
                    raise Untraceable("its code changes a tensor that does not depend on the images in place")
                return Value(number)
            if isinstance(leaf, torch.dtype | torch.device) and leaf in self.likes:
                return self.likes[leaf]
            return leaf

        return mapped(written, tree)

    def finish(self, image: Value, output: Any) -> Trace:
        """The whole."""
        for module, buffers in self.recorded.items():
            if reset := [name for name, tensor in buffers.items() if module._buffers.get(name) is not tensor]:
                path = f"{self.paths[module]}.{reset[0]}".lstrip(".")
                raise Untraceable(f"its code sets {path} to another tensor; change it in place (copy_)")
        if not isinstance(output, Tensor) or id(output) not in self.numbers:
            kind = type(output).__name__ if not isinstance(output, Tensor) else "a tensor of its own"
            raise Untraceable(f"its features are {kind}, and must be one tensor")
        if not output.is_floating_point():
            raise Untraceable(f"its features are {output.dtype}, and must be real numbers")
        shapes = {
            number: tuple(int(s) for s in tensor.size()) for number, (tensor, _) in enumerate(self.tensors)
        }
        changed = frozenset(
            n for n, (tensor, version) in enumerate(self.tensors) if tensor._version != version
        )
        value = Value(self.numbers[id(output)])
        return Trace(self.nodes, image, value, shapes, changed, frozenset(self.dependent))


def _plain(tree: Any) -> Any:
    """Traced numbers as plain ones."""
    return mapped(lambda leaf: int(leaf) if isinstance(leaf, TracedInt) else leaf, tree)
