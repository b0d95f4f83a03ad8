"""The errors this project raises: each a sentence, a code, a status and whether callers may read it."""

from collections.abc import Callable
from functools import wraps
from typing import ClassVar, ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class InterpretOpsError(Exception):
    """Anything that this project refuses to do."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    public: ClassVar[bool] = False
    """Whether the message may be shown to a caller of the gateway."""


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
    """A plan file is not a whole, consistent plan, or does not fit this engine."""

    code = "invalid_plan"
    status = 400


class NoRoomError(PlanError):
    """The tables have no room for another plan; nothing is wrong with it."""

    code = "table_full"
    status = 507


class DictionaryError(InterpretOpsError):
    """A dictionary cannot be read, or is not of this model."""

    code = "invalid_dictionary"
    status = 400


class AdapterError(InterpretOpsError):
    """An adapter cannot be read, found, or does not fit the model."""

    code = "invalid_adapter"
    status = 400


class ModelError(InterpretOpsError):
    """A model folder is missing, incomplete or of an unknown kind."""

    code = "invalid_model"
    status = 400


class EngineError(InterpretOpsError):
    """The engine is not there, not proven, or refused."""

    code = "engine_unavailable"
    status = 503


def refused_plainly(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """For what users of the SDK call: a refusal reaches them without the pages of the libraries beneath.

    Its message says what is wrong with what was given; how deep inside it was noticed helps nobody.
    """

    @wraps(function)
    def call(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Result:
        try:
            return function(*arguments, **named)
        except InterpretOpsError as error:
            raise error.with_traceback(None) from None

    return call
