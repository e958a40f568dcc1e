"""Which convs' results a value was computed from, whatever way it went."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# ops that ask a tensor for its shape alone, and ways of its values into code that is not torch's
_SHAPE_ONLY = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
               "new_zeros", "new_ones", "new_empty", "new_empty_strided", "new_full"}  # fmt: skip
_LEAVE_TORCH = {"numpy", "__array__", "tolist", "data_ptr", "__dlpack__"}


class Dependence(TorchDispatchMode):
    """Within it, every op's results come from what its arguments come from; `mark` says where that begins.

    Autograd would miss what passes through `detach`, `h > 0` or argmax; a comparison of values what shows in rare ones.
    It is noted for the memory that a value lies in: views share it, and whoever writes there adds to it. Values which
    the host reads (`item`, `if h.max() > 0`, the number of rows of `h[h > 0]`, numpy) may decide all that comes after:
    they are `read`, and everything comes from them. C++ code that is no torch op is not seen.
    """

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.read: frozenset[Hashable] = frozenset()
        self._from: dict[int, tuple[Tensor, frozenset]] = {}  # with the tensor, so that its memory is not used again
        self._leaving = _Leaving(self)
        self._in_op = False

    def mark(self, tensor: Tensor, source: Hashable) -> None:
        """This tensor comes from `source` alone."""
        self._from[_memory(tensor)] = tensor, frozenset([source])

    def cut(self, tensor: Tensor) -> Tensor:
        """A copy that comes from nothing."""
        copy = tensor.detach().clone()
        self._from.pop(_memory(copy), None)
        return copy

    def of(self, *values: object) -> frozenset[Hashable]:
        """What the tensors in these values, in lists and dicts too, come from."""
        known = (self._from.get(_memory(value)) for value in tree_leaves(values) if isinstance(value, Tensor))
        return self.read.union(*(sources for _, sources in filter(None, known)))

    def note_read(self, *values: object) -> None:
        """The host knows something of these tensors' values."""
        self.read = self.of(*values)

    def __enter__(self) -> Dependence:
        self._leaving.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._leaving.__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        # A class of its own, as PyG's EdgeIndex, comes first: what it does with the tensors inside is seen here again.
        if any(kind not in (Tensor, nn.Parameter) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        sources = self.of(args, kwargs)
        within, self._in_op = self._in_op, True
        try:
            out = op(*args, **kwargs)
        finally:
            self._in_op = within
        if not isinstance(op, torch._ops.OpOverload):  # it runs functions, whose closures are arguments too
            self.read = self.read.union(*(kept for _, kept in self._from.values()))
            return out
        if sources and op._overloadpacket.__name__ not in _SHAPE_ONLY:
            given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
            written = [given.get(a.name) for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
            for value in tree_leaves([out, written]):
                if isinstance(value, Tensor):
                    self._from[_memory(value)] = value, sources | self.of(value)
            self.note_read(_told_to_host(op, args, kwargs))
        return out

    def leaves(self, *values: object) -> None:
        """These tensors go into code that is not torch's; within an op what comes of it is known."""
        if not self._in_op:
            self.note_read(values)


class _Leaving(TorchFunctionMode):
    """Sees tensors handed to code that is not torch's."""

    def __init__(self, dependence: Dependence):
        super().__init__()
        self.dependence = dependence

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", None) in _LEAVE_TORCH:
            self.dependence.leaves(args)
        return function(*args, **(kwargs or {}))


def _told_to_host(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> object:
    """The arguments of whose values the host learns something: a number, or by them the shape of the result."""
    if op is torch.ops.aten.index.Tensor:  # x[mask] has a shape by the mask, x[ids] has not
        return [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
    tells = torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags
    return (args, kwargs) if tells else ()


def _memory(tensor: Tensor) -> int:
    # a sparse tensor, or one inside vmap, has none of its own
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else id(tensor)
