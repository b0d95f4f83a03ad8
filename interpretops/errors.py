"""The project's errors: each has a code, an HTTP status, and a flag that says whether clients may read it."""

from collections.abc import Callable
from functools import wraps
from typing import ClassVar, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class InterpretOpsError(Exception):
    """The base of all errors that this project raises."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    public: ClassVar[bool] = False
    """Whether the gateway may show the message to a client."""


class ConfigError(InterpretOpsError):
    """The configuration is wrong; the message names file, field, value and remedy."""

    code = "invalid_config"


class PolicyError(InterpretOpsError):
    """A policy cannot be loaded or compiled; one line per fault."""

    code = "invalid_policy"
    status = 400

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class PlanError(InterpretOpsError):
    """A plan file is incomplete, inconsistent, or does not fit this engine."""

    code = "invalid_plan"
    status = 400


class NoRoomError(PlanError):
    """The tables have no room for another plan; the plan itself is valid."""

    code = "table_full"
    status = 507


class DictionaryError(InterpretOpsError):
    """A dictionary is unreadable or belongs to another model."""

    code = "invalid_dictionary"
    status = 400


class AdapterError(InterpretOpsError):
    """An adapter is missing, unreadable or does not fit the model."""

    code = "invalid_adapter"
    status = 400


class ModelError(InterpretOpsError):
    """A model folder is missing, incomplete or of an unsupported kind."""

    code = "invalid_model"
    status = 400


class EngineError(InterpretOpsError):
    """The engine is unreachable, has no valid attestation, or refused."""

    code = "engine_unavailable"
    status = 503


def refused_plainly(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorates SDK entry points: raise our errors without a traceback into the libraries below.

    The message says which argument is wrong; where it was noticed does not help the user.
    """

    @wraps(function)
    def call(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        try:
            return function(*arguments, **named)
        except InterpretOpsError as error:
            raise error.with_traceback(None) from None

    return call
