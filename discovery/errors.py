"""Errors of offline jobs, each one line."""

from typing import ClassVar

from interpretops.errors import InterpretOpsError


class DiscoveryError(InterpretOpsError):
    """A job cannot start or resume; the message names file, field, value and remedy."""

    code: ClassVar[str] = "invalid_job"
    status: ClassVar[int] = 400
