"""An op with many arguments, without the dispatcher where nobody would see the difference.

``torch.library`` looks every argument up in the schema, and reads the whole schema for each: time that grows
with the square of their number, a good part of a small call. The dispatcher is there for those who watch it:
compilers, dispatch modes (fake tensors, selective checkpointing, counters) and tensor subclasses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def direct(op: Callable, forward: Callable, backward: Callable, setup_context: Callable) -> Callable:
    """``op``, or the functions that it is made of as one :class:`torch.autograd.Function`."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            output = forward(*arguments)
            setup_context(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx, *upstream):
            return backward(ctx, *upstream)

    def run(*arguments):
        return (op if _watched(arguments) else Direct.apply)(*arguments)

    return run


def _watched(arguments: tuple) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or any(isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter) for x in arguments)
    )
