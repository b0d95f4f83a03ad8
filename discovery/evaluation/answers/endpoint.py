"""Asks the gateway under a policy or under none, and takes no answer without proof of which it was."""

import asyncio
import json
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from discovery.errors import DiscoveryError

HEADER = "X-Steering-Policy"
RECEIPT = "X-Steering-Receipt"
NONE = "none"
ATTEMPTS = 5
FIRST_PAUSE_S = 0.5
NOT_READY = "engine_not_ready"
PATIENCE_S = 300.0
"""How long a gateway may be without its engine: it starts a lost one again, which takes a minute or two."""
_LABEL = re.compile(r"(?P<id>[A-Za-z0-9][A-Za-z0-9._-]{0,127})@(?P<revision>[0-9a-f]{12})")
_REVISION = re.compile(r"[0-9a-f]{64}")
_TOO_LONG = re.compile(r"maximum (context|model) length", re.IGNORECASE)
_BUSY = frozenset((408, 429, 500, 502, 503, 504))


class UnprovenAnswerError(DiscoveryError):
    """An answer came without proof of the policy that was asked for; it is not counted."""

    code = "unproven_answer"


class PromptTooLongError(DiscoveryError):
    """A prompt does not fit into the model's context."""

    code = "prompt_too_long"


class PromptNotToldError(DiscoveryError):
    """The policy edits prompts and answers differently, so the gateway tells no prompt log-probabilities."""

    code = "prompt_not_told"


@dataclass(frozen=True)
class Proof:
    """What the gateway's headers state about one answer."""

    revision: str
    """64 hex, or `none`."""
    gates_fired: int | None
    cached_tokens: int | None = None


class Endpoint:
    """An OpenAI-style endpoint of ours."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self.url = url.rstrip("/").removesuffix("/v1")

    async def model(self) -> str:
        """The name of the model that is served."""
        names = await self.names()
        plain = [name for name in names if name and "+" not in name]
        if not plain:
            raise DiscoveryError(f"{self.url}: serves no model (GET /v1/models lists {names})")
        return plain[0]

    async def names(self) -> list[str]:
        """All names that are served: the model, and ``<model>+<policy>`` for each policy to choose."""
        listed, _ = await self._ask("GET", "/v1/models", None, {})
        return [str(entry.get("id", "")) for entry in listed.get("data", [])]

    async def post(self, route: str, body: dict[str, Any], policy: str) -> tuple[dict[str, Any], Proof]:
        """Ask under ``policy`` (an id, or `none`). Raises `UnprovenAnswerError` when that is not proven."""
        answer, headers = await self._ask("POST", route, body, {HEADER: policy})
        return answer, _proof(policy, headers, f"{self.url}{route}")

    async def _ask(
        self, method: str, route: str, body: dict[str, Any] | None, headers: dict[str, str]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        attempts, patient_until = 0, math.inf
        while True:
            waits = False
            try:
                async with self._session.request(
                    method, self.url + route, json=body, headers=headers
                ) as response:
                    data = await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                why = f"{type(error).__name__}: {error}"
            else:
                if response.status == 200:
                    return _object(data, self.url + route), {
                        key.lower(): value for key, value in response.headers.items()
                    }
                why = f"status {response.status}: {_error(data, 'message') or 'no reason given'}"
                if response.status == 400 and _TOO_LONG.search(why):
                    raise PromptTooLongError(f"{self.url}{route}: {why}")
                if response.status == 400 and _error(data, "param") == "prompt_logprobs":
                    raise PromptNotToldError(f"{self.url}{route}: {why}")
                if response.status not in _BUSY:
                    raise DiscoveryError(f"{self.url}{route}: {why}")
                if _error(data, "code") == NOT_READY:
                    patient_until = min(patient_until, time.monotonic() + PATIENCE_S)
                    waits = time.monotonic() < patient_until
            attempts += not waits
            if attempts == ATTEMPTS:
                raise DiscoveryError(
                    f"{self.url}{route}: {why}; when it serves again, run the same command to resume"
                )
            await asyncio.sleep(FIRST_PAUSE_S * 2 ** (ATTEMPTS - 2 if waits else attempts - 1))


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise DiscoveryError(f"{where}: did not answer with JSON") from error
    if not isinstance(value, dict):
        raise DiscoveryError(f"{where}: did not answer with a JSON object")
    return value


def _error(data: bytes, field: str) -> str:
    try:
        return str(json.loads(data)["error"][field])[:300]
    except (ValueError, KeyError, TypeError):
        return ""


def _proof(policy: str, headers: dict[str, str], where: str) -> Proof:
    """The proof in an answer's headers; label and receipt must both name the policy that was asked for."""
    label, text = headers.get(HEADER.lower()), headers.get(RECEIPT.lower())
    fault = UnprovenAnswerError
    if label is None or text is None:
        missing = HEADER if label is None else RECEIPT
        raise fault(f"{where}: answered without {missing}; --url must name our gateway, not the engine")
    try:
        receipt = json.loads(text)
        revision = str(receipt["revision"])
    except (ValueError, KeyError, TypeError) as error:
        raise fault(f"{where}: {RECEIPT} is no receipt; the answer is not counted") from error
    if policy == NONE:
        if label != NONE or revision != NONE:
            raise fault(f"{where}: asked for {HEADER} none, but {HEADER} = {label!r}; is a policy mandatory?")
        return Proof(NONE, None, _count(receipt, "cached_tokens"))
    match = _LABEL.fullmatch(label)
    if match is None or match["id"] != policy:
        raise fault(f"{where}: asked for {HEADER} {policy}, but {HEADER} = {label!r}")
    if not _REVISION.fullmatch(revision) or not revision.startswith(match["revision"]):
        raise fault(f"{where}: {HEADER} = {label!r}, but the receipt is for revision {revision[:12]!r}")
    if not isinstance(receipt.get("tokens_evaluated"), int) or receipt["tokens_evaluated"] < 1:
        raise fault(f"{where}: the receipt says that {policy} read no token; the answer is not counted")
    return Proof(revision, _count(receipt, "gates_fired"), _count(receipt, "cached_tokens"))


def _count(receipt: dict[str, Any], key: str) -> int | None:
    found = receipt.get(key)
    return found if isinstance(found, int) else None
