"""One torch.library fragment for every op of this package."""

from collections.abc import Callable

import torch

# Library.define/impl costs ~7 us a call, torch.library.custom_op ~36 us; a training step calls these ops often.
_LIBRARY = torch.library.Library("vqgnn", "FRAGMENT")


def register(schema: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverloadPacket:
    """Define `vqgnn::<schema>`, run `implementation` on every device and `fake` under tracing; return the op."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vqgnn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.vqgnn, name)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Give `vqgnn::<name>` its backward."""
    torch.library.register_autograd(f"vqgnn::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
