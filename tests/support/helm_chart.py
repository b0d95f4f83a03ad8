"""The types of the fixtures that run Helm on our chart."""

import subprocess
from collections.abc import Callable
from typing import Any

Helm = Callable[..., subprocess.CompletedProcess[str]]
"""`helm(command, values)` runs Helm on the chart with values over its own."""
Render = Callable[..., list[dict[str, Any]]]
"""`render(**values)` returns the documents that the chart makes of these values."""
