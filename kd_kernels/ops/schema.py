"""An op's arguments, stated once for the op, its backward and everything that unpacks a call."""

from __future__ import annotations


def names(arguments: str) -> tuple[str, ...]:
    """Of ``"Tensor values, Tensor? weight"``: ``("values", "weight")``."""
    return tuple(argument.split()[-1] for argument in arguments.split(","))
