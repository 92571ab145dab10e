"""Settings against signatures: the annotations of a constructor are the schema of its YAML."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from scoresde_cli.errors import ScoreSDEError, nearest


def check_call(target: Callable[..., Any], given: Mapping[str, Any], where: str, runtime: tuple[str, ...] = ()) -> None:
    """Refuse unknown, missing, ill-typed or impossible arguments of `target`.

    Args:
        target: a class or function with annotated parameters; pydantic's constraints in `Annotated` are enforced.
        given: the settings; those that are objects already are taken as they are.
        where: dotted prefix of the keys in the config, for the message.
        runtime: parameters that the program fills in, which a config may not.

    Raises ScoreSDEError with the key, what was given, what was expected and the nearest right name.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    parameters = {
        name: p for name, p in inspect.signature(target).parameters.items()
        if name not in runtime and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }  # fmt: skip
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(target).parameters.values())
    prefix = f"{where}." if where else ""
    for name in given:
        if name not in parameters and not open_ended:
            known = ", ".join(sorted(parameters)) or "none"
            raise ScoreSDEError(f"unknown key {prefix}{name}: expected one of {known}{nearest(name, parameters)}")
    for name, parameter in parameters.items():
        if name not in given and parameter.default is parameter.empty:
            raise ScoreSDEError(f"{prefix}{name} is missing: set it with {prefix}{name}=...")
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    for name, value in given.items():
        if name not in hints or not isinstance(value, str | int | float | bool | list | dict | None):
            continue
        if value == "???":
            raise ScoreSDEError(f"{prefix}{name} is missing: set it with {prefix}{name}=...")
        try:
            TypeAdapter(
                hints[name], config=ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
            ).validate_python(value, strict=True)
        except ValidationError as problem:
            error = problem.errors()[0]
            expected = " or ".join(
                e["msg"].removeprefix("Input should be ") for e in problem.errors()
            )  # one of a union each
            choices = [c.strip("' ") for c in expected.replace(" or ", ",").split(",")]
            near = nearest(value, choices) if isinstance(value, str) and error["type"] == "literal_error" else ""
            raise ScoreSDEError(f"{prefix}{name}={value}: expected {expected}{near}") from None
