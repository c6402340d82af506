"""The tests, and how they check the shapes in tl_dla's signatures."""

import sys
from collections.abc import Callable
from typing import Any

from beartype import beartype

_checks: dict[tuple[str, ...], Callable] = {}


def checked(signature: Callable) -> Callable:
    """What checks the arguments or the result of a function of tl_dla, made once a signature.

    jaxtyping asks for it where a function is defined: of one within another, at every call. A
    function without shapes is left alone: its types are for the static checker.
    """
    hints, frame = signature.__annotations__, sys._getframe(1)
    while frame and frame.f_code.co_name != "jaxtyped":
        frame = frame.f_back
    function = frame.f_locals["fn"] if frame else signature  # of one argument that was wrong
    if hints.get("return", Any) is not Any and "jaxtyping" not in str(hints):
        function.__no_type_check__ = True  # which jaxtyping heeds
    if getattr(function, "__no_type_check__", False):
        return signature
    names = signature.__code__.co_varnames
    types = [f"{name}: {hint}" for name, hint in hints.items()]
    key = (signature.__module__, signature.__qualname__, *names, *types)
    if key not in _checks:
        _checks[key] = beartype(signature)
    return _checks[key]
