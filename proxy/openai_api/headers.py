"""Headers that the gateway reads and sends on its public listener."""

from typing import Final

POLICY_HEADER: Final = "X-Steering-Policy"
"""Request: a policy id, or `none`. Response: the policy applied, `<id>@<12 hex of the revision>`."""
RECEIPT_HEADER: Final = "X-Steering-Receipt"
"""The receipt of an answer that is not streamed, as compact JSON."""
REQUEST_ID_HEADER: Final = "X-Request-Id"
PROCESSING_HEADER: Final = "openai-processing-ms"
