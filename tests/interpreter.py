"""Triton's interpreter, quicker, and with a GPU's maximum of a number and NaN, which is the number unless a
kernel asks for NaN (the interpreter takes numpy's: NaN). Otherwise the same.

Most of its time goes into describing types.

Every result of an instruction is described anew: a block type with its shape checked and its name written, a
tuple of constants, numpy's name of the type. Here what depends on a type alone is made once. Every check of
Triton's semantics that can fail still runs.

All of this is private to Triton: what another release does not have stays as it is there, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from triton.language import core, semantic
from triton.runtime import interpreter

PLAIN = {int, float, bool, str, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type}


def patch_each_module_once(patch: Callable) -> Callable:
    """Triton patches its whole language again at every call of a device function. While a kernel runs, once
    for each module is enough."""
    patched: set[int] = set()

    def once(function):
        module = id(function.__globals__)
        if module in patched:
            return None
        outermost = not patched
        patched.add(module)
        scope = patch(function)
        if outermost and scope is not None:
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        return scope

    return once


def remember_numpy_types(find: Callable) -> Callable:
    known: dict[str, np.dtype] = {}

    def numpy_type(kind):
        name = kind.scalar.name
        found = known.get(name)
        if found is None:
            found = known[name] = find(kind)
        return found

    return numpy_type


def remember_blocks(init: Callable) -> Callable:
    known: dict[tuple, dict] = {}

    def block(self, element_ty, shape):
        key = (element_ty.name, *(x.value if type(x) is core.constexpr else x for x in shape))
        found = known.get(key)
        if found is None:
            init(self, element_ty, shape)
            found = known[key] = {k: v for k, v in vars(self).items() if k != "element_ty"}
        else:
            self.element_ty = element_ty
            vars(self).update(found)

    return block


def remember_shapes(init: Callable) -> Callable:
    known: dict[tuple, tuple] = {}

    def tensor(self, handle, type):
        shape = tuple(type.shape.values) if type.is_block() else ()
        found = known.get(shape)
        if found is None:
            init(self, handle, type)
            known[shape] = self.shape, self.numel
            return
        self.shape, self.numel = found
        self.handle, self.type, self.dtype = handle, type, type.scalar

    return tensor


def equal_if_the_same(equal: Callable) -> Callable:
    return lambda self, other: self is other or equal(self, other)


def unwrap_constants_only(unwrap: Callable) -> Callable:
    return lambda x: x if x.__class__ in PLAIN else unwrap(x)


def leave_what_agrees(broadcast: Callable) -> Callable:
    def agree(self, left, right):
        of_left, of_right = left.type, right.type
        if of_left.is_block():
            same = of_right.is_block() and of_left.shape.values == of_right.shape.values
        else:
            same = not of_right.is_block()
        return (left, right) if same else broadcast(self, left, right)

    return agree


def look_for_overflow_when_it_is_said(check: Callable) -> Callable:
    """A sum's overflow is looked for in ten interpreted instructions, and said only in debug mode."""
    return lambda self, *sum: check(self, *sum) if self.builder.options.debug else None


def number_before_nan(choose: Callable) -> Callable:
    return lambda _: lambda self, left, right: self.binary_op(left, right, choose)


MEANING: list[tuple[object, str, Callable]] = [
    (interpreter.InterpreterBuilder, "create_maxnumf", number_before_nan(np.fmax)),
    (interpreter.InterpreterBuilder, "create_minnumf", number_before_nan(np.fmin)),
]
# Before Triton 3.4 types are made of other things.
SEMANTICS = getattr(semantic, "TritonSemantic", None)
SPEED: list[tuple[object, str, Callable]] = [
    (interpreter, "_patch_lang", patch_each_module_once),
    (interpreter, "_get_np_dtype", remember_numpy_types),
    (core.block_type, "__init__", remember_blocks),
    (core.tensor, "__init__", remember_shapes),
    (core.dtype, "__eq__", equal_if_the_same),
    (core.block_type, "__eq__", equal_if_the_same),
    (core, "_unwrap_if_constexpr", unwrap_constants_only),
    (SEMANTICS, "broadcast_impl_value", leave_what_agrees),
    (SEMANTICS, "binary_op_sanitize_overflow_impl", look_for_overflow_when_it_is_said),
]
PATCHES = MEANING + (SPEED if SEMANTICS else [])


REPLACED: list[tuple[object, str, Callable]] = []  # by quick: what Triton has


@contextmanager
def quick() -> Iterator[None]:
    REPLACED[:] = [(owner, name, vars(owner)[name]) for owner, name, _ in PATCHES if name in vars(owner)]
    makers = {(owner, name): make for owner, name, make in PATCHES}
    for owner, name, original in REPLACED:
        setattr(owner, name, makers[owner, name](original))
    try:
        yield
    finally:
        for owner, name, original in REPLACED:
            setattr(owner, name, original)
