"""The tests, and how they check the types and shapes in tl_dla's signatures."""

from collections.abc import Callable

from beartype import beartype

_checks: dict[tuple[str, ...], Callable] = {}


def checked(signature: Callable) -> Callable:
    """What checks the arguments or the result of a function of tl_dla, made once a signature.

    jaxtyping asks for it where a function is defined: of one within another, at every call.
    """
    names = signature.__code__.co_varnames
    types = [f"{name}: {hint}" for name, hint in signature.__annotations__.items()]
    key = (signature.__module__, signature.__qualname__, *names, *types)
    if key not in _checks:
        _checks[key] = beartype(signature)
    return _checks[key]
