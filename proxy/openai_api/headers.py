"""The headers that the gateway reads and sets on its public listener."""

from typing import Final

POLICY_HEADER: Final = "X-Steering-Policy"
"""In a request: a policy id, or `none`. In an answer: what was applied, `<id>@<12 hex of the revision>`."""
RECEIPT_HEADER: Final = "X-Steering-Receipt"
"""What the engine did for a whole answer, as compact JSON."""
REQUEST_ID_HEADER: Final = "X-Request-Id"
PROCESSING_HEADER: Final = "openai-processing-ms"
