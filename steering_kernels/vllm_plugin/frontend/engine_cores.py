"""The front end's calls to all engine cores behind it, with parsed results."""

from __future__ import annotations

import base64
from typing import Any

from interpretops.engine_api import (
    EngineRefusal,
    LoadedPlan,
    RankDigest,
    RankGroup,
    RetiredPlan,
    read_loaded,
)


class EngineCores:
    """Every method calls all cores; the client's own method would return only the first core's result."""

    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client

    async def load(self, revision: str, plan: bytes) -> LoadedPlan | EngineRefusal:
        """Load a plan into every core. Returns all ranks, or the first refusal."""
        ranks: list[RankDigest] = []
        for answer in await self._call("interpretops_load", base64.b64encode(plan).decode()):
            loaded = read_loaded(answer)
            if isinstance(loaded, EngineRefusal):
                return loaded
            ranks += loaded.ranks
        return LoadedPlan(revision=revision, ranks=ranks)

    async def retire(self, revision: str) -> RetiredPlan:
        """Retire a revision in every core."""
        answers = [RetiredPlan.parse(answer) for answer in await self._call("interpretops_retire", revision)]
        return RetiredPlan(revision=revision, in_flight=sum(answer.in_flight for answer in answers))

    async def attest(self) -> list[RankGroup]:
        """The revisions each core admits, and the contents of its ranks."""
        return [RankGroup.parse(answer) for answer in await self._call("interpretops_attest")]

    async def _call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        return list(await self._client.engine_core.call_utility_all_async(method, *args))
