"""Limits per tenant, reported in the headers that OpenAI clients read."""

import asyncio
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from fake_engine import FakeEngine
from running_gateway import Front, Start, Until

from interpretops.errors import ConfigError
from interpretops.settings import Limits, Tenant
from proxy.errors import BudgetSpent, InvalidRequest, RateLimited
from proxy.observe.metrics import Metrics
from proxy.openai_api.request_size import size_of
from proxy.tenants.budget import Budgets
from proxy.tenants.limits import Limiter, Meter

LOG = structlog.wrap_logger(None, processors=[structlog.testing.LogCapture()])


class Clock:
    """A clock that the test advances."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def meter_of(clock: Clock, **limits: int) -> Meter:
    return Limiter(Budgets(None, Metrics(), LOG), clock).meter(Tenant(id="t", limits=Limits(**limits)))


def anonymous(**limits: int) -> dict[str, list[dict[str, Any]]]:
    return {"tenants": [{"id": "anonymous", "limits": limits}]}


def take(meter: Meter) -> None:
    with meter.request():
        pass


def test_requests_fill_up_evenly() -> None:
    """A minute's worth of requests passes at once, then one for every share of a minute."""
    clock = Clock()
    meter = meter_of(clock, requests_per_minute=3)
    for _ in range(3):
        take(meter)
    with pytest.raises(RateLimited) as refused:
        take(meter)
    assert (refused.value.headers["Retry-After"], refused.value.headers["retry-after-ms"]) == ("20", "20000")
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += 19
    with pytest.raises(RateLimited):
        take(meter)
    clock.now += 1.01
    take(meter)
    clock.now += 3600
    assert meter.headers()["x-ratelimit-remaining-requests"] == "3"


def test_tokens_are_reserved_and_corrected() -> None:
    """A request is admitted on an estimate; actual usage is charged, and a debt must be waited out."""
    clock = Clock()
    meter = meter_of(clock, tokens_per_minute=600)
    charge = meter.reserve(size_of({"max_tokens": 500}, 400))
    assert meter.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimited):
        meter.reserve(size_of({"max_tokens": 1}, 4))
    charge.settle(100)
    charge.settle(100)
    assert meter.headers()["x-ratelimit-remaining-tokens"] == "500"
    meter.reserve(size_of({"max_tokens": 10}, 4)).settle(1100)
    with pytest.raises(RateLimited) as refused:
        meter.reserve(size_of({"max_tokens": 1}, 0))
    assert refused.value.headers["Retry-After"] == "61"
    clock.now += 1000
    huge = meter.reserve(size_of({"max_tokens": 10_000}, 0))
    huge.settle(None)
    assert meter.headers()["x-ratelimit-remaining-tokens"] == "0"


@pytest.mark.parametrize(
    ("body", "requests", "tokens"),
    [
        ({"max_tokens": 10}, 1, 110),
        ({"max_completion_tokens": 20, "n": 3}, 3, 3 * 120),
        ({"max_output_tokens": 5}, 1, 105),
        ({"max_tokens": 5.0, "max_completion_tokens": 7}, 1, 107),
        ({}, 1, 356),
        ({"max_tokens": -5, "n": None}, 1, 356),
        ({"prompt": "a", "max_tokens": 1}, 1, 101),
        ({"prompt": ["a"] * 40, "max_tokens": 2, "n": 2}, 80, 2 * 100 + 80 * 2),
        ({"prompt": [7] * 300, "max_tokens": 1}, 1, 301),
        ({"prompt": [[7] * 100, [8] * 200], "max_tokens": 1}, 2, 302),
    ],
)
def test_size(body: dict[str, Any], requests: int, tokens: int) -> None:
    """Text counts four bytes a token, token ids count exactly, plus the longest answer; requests are prompts
    times choices."""
    size = size_of(body, 400)
    assert (size.requests, size.tokens) == (requests, tokens)


@pytest.mark.parametrize(
    "body",
    [
        *({"n": n} for n in (0, -1, True, "2", 1.5, [2], float("inf"))),
        {"n": {}},
        {"max_tokens": "9"},
        {"max_completion_tokens": [9]},
        {"max_output_tokens": {}},
        {"max_tokens": True},
        {"prompt": []},
        {"prompt": [[]]},
        *({"prompt": prompt} for prompt in (["a", 1], [1, "a"], [[1], "a"], [True], [[1], [True]])),
        *({"prompt": prompt} for prompt in ({"prompt_token_ids": [1]}, [[[1]]], [1.0], 7, [None])),
    ],
)
def test_invalid_counts_are_refused_by_name(body: dict[str, Any]) -> None:
    """The engine would read `"2"` and `true` as numbers; here they would count as nothing."""
    with pytest.raises(InvalidRequest) as refused:
        size_of(body, 10)
    assert [refused.value.param] == list(body)


async def ask(front: Front, **fields: Any) -> tuple[Any, ...]:
    body = {"model": "tiny-model", **fields}
    async with front.public.post("/v1/completions", json=body) as answer:
        return answer.status, answer.headers, await answer.json()


async def test_array_of_prompts_counts_as_many_requests(start: Start, engine: FakeEngine) -> None:
    """A thousand prompts count as a thousand requests for rate, concurrency and tokens."""
    front = await start("calm", **anonymous(requests_per_minute=100, tokens_per_minute=5000))
    status, headers, _ = await ask(front, prompt=["a"] * 30, n=2, max_tokens=4)
    assert (status, headers["x-ratelimit-remaining-requests"]) == (200, "40")
    assert int(headers["x-ratelimit-remaining-tokens"]) < 5000 - 60 * 4
    status, headers, body = await ask(front, prompt=["a"] * 60, max_tokens=1)
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 10 <= int(headers["Retry-After"]) <= 13
    assert len(engine.seen) == 1


@pytest.mark.parametrize(
    ("limits", "fields", "bound"),
    [
        ({"concurrency": 1}, {"prompt": ["a", "b"]}, "1 are allowed at a time"),
        ({"concurrency": 3}, {"prompt": "a", "n": 4}, "3 are allowed at a time"),
        ({"requests_per_minute": 9}, {"prompt": ["a"] * 5, "n": 2}, "9 are allowed a minute"),
        ({"tokens_per_minute": 100}, {"prompt": ["a"] * 20, "max_tokens": 10}, "100 are allowed a minute"),
        ({"token_budget": 10}, {"prompt": ["a"] * 9, "max_tokens": 1}, "10 are allowed a month"),
        ({"token_budget": 10}, {"prompt": [7] * 200_000}, "10 are allowed a month"),
        ({}, {"prompt": ["a"] * 257}, "257 prompts are 257 answers, but at most 256"),
        ({}, {"prompt": ["a"] * 129, "n": 2}, "129 prompts times n = 2 are 258 answers, but at most 256"),
        ({}, {"prompt": "a", "n": 65}, "n = 65, but at most 64"),
    ],
)
async def test_request_over_a_hard_limit_is_not_retryable(
    start: Start, engine: FakeEngine, limits: dict[str, int], fields: dict[str, Any], bound: str
) -> None:
    """A 400 that names the limit, not a 429 that a client would retry forever."""
    front = await start("calm", **anonymous(**limits), **{"gateway.max_body_values": 300_000})
    status, headers, body = await ask(front, **fields)
    assert (status, headers["x-should-retry"]) == (400, "false")
    assert bound in body["error"]["message"]
    assert engine.seen == []
    meter = front.apps.gateway.limiter.meter(front.apps.gateway.settings.tenants[0])
    assert meter.in_flight == 0


async def test_answers_at_a_time_are_bounded(start: Start, engine: FakeEngine, until: Until) -> None:
    """A request takes one concurrency slot per answer; all are free again when it ends."""
    front = await start("calm", **anonymous(concurrency=4))
    engine.trick = "hold"
    first = asyncio.create_task(ask(front, prompt=["a", "b", "c"]))
    await engine.arrived.wait()
    assert (await ask(front, prompt=["a", "b"]))[0] == 429
    engine.trick = ""
    assert (await ask(front, prompt="a"))[0] == 200
    engine.go_on.set()
    assert (await first)[0] == 200
    assert (await ask(front, prompt=["a"] * 4))[0] == 200


def test_budget_is_never_overdrawn_by_stated_lengths() -> None:
    """Tokens of requests in progress are reserved: together they never exceed what is left."""
    meter = meter_of(Clock(), token_budget=1000)
    one = meter.reserve(size_of({"max_tokens": 500}, 400))
    with pytest.raises(RateLimited, match="0 are used and 600 reserved"):  # room may become free soon
        meter.reserve(size_of({"max_tokens": 500}, 400))
    one.settle(50)
    meter.reserve(size_of({"max_tokens": 500}, 400)).settle(600)
    with pytest.raises(BudgetSpent, match="650 are used, and this request may use 400"):
        meter.reserve(size_of({"max_tokens": 300}, 400))
    meter.reserve(size_of({}, 400)).settle(10)


def test_budget_outlasts_a_restart_and_a_clock_set_back(tmp_path: Path) -> None:
    """Usage counts until the next period; a clock that goes backwards starts none."""
    today = [datetime(2026, 3, 31, 23, tzinfo=UTC)]
    limited = Tenant(id="t", limits=Limits(token_budget=100))

    def fresh() -> tuple[Budgets, Meter]:
        budgets = Budgets(tmp_path, Metrics(), LOG, lambda: today[0])
        return budgets, Limiter(budgets).meter(limited)

    budgets, meter = fresh()
    meter.reserve(size_of({}, 0)).settle(150)
    budgets.close()
    budgets, meter = fresh()
    for moment in (datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)):
        today[0] = moment
        with pytest.raises(BudgetSpent) as refused:
            meter.reserve(size_of({}, 0))
        assert (refused.value.status, refused.value.code) == (429, "insufficient_quota")
        assert refused.value.retry is False
    today[0] = datetime(2026, 4, 1, tzinfo=UTC)
    meter.reserve(size_of({}, 0))
    with pytest.raises(ConfigError, match=r"another gateway writes to"):
        fresh()
    budgets.close()
    (tmp_path / "usage.json").write_text("[")
    with pytest.raises(ConfigError, match=r"usage.json: not a valid budgets file"):
        fresh()


async def test_rate_limited_requests_get_429(start: Start, engine: FakeEngine) -> None:
    """The error has OpenAI's format and says when to retry; answers say what is left."""
    front = await start("calm", **anonymous(requests_per_minute=2, tokens_per_minute=100_000))
    left = []
    for _ in range(2):
        status, headers, _ = await front.chat()
        left.append(headers["x-ratelimit-remaining-requests"])
        assert (status, headers["x-ratelimit-limit-tokens"]) == (200, "100000")
    assert left == ["1", "0"]
    status, headers, body = await front.chat()
    assert (status, body["error"]["type"], body["error"]["code"]) == (
        *(429, "rate_limit_error", "rate_limit_exceeded"),
    )
    assert headers["x-should-retry"] == "true"
    assert 1 <= int(headers["Retry-After"]) <= 30
    assert len(engine.seen) == 2
    assert 'interpretops_refusals_total{reason="rate_limit_exceeded"} 1.0' in (
        front.apps.gateway.metrics.render().decode()
    )


async def test_official_client_obeys(start: Start, engine: FakeEngine) -> None:
    """The `openai` package raises its RateLimitError, and streams carry the headers too."""
    import openai

    front = await start("calm", **anonymous(requests_per_minute=1))
    url = str(front.public._base_url)
    async with openai.AsyncOpenAI(base_url=f"{url}v1", api_key="x", max_retries=0) as client:
        asked = {"model": "tiny-model", "messages": [{"role": "user", "content": "hi"}]}
        raw = await client.chat.completions.with_raw_response.create(stream=True, **asked)
        assert raw.headers["x-ratelimit-limit-requests"] == "1"
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(**asked)
    assert refused.value.code == "rate_limit_exceeded"


async def test_requests_at_a_time_are_bounded(start: Start, engine: FakeEngine, until: Until) -> None:
    """Beyond its limit a tenant is refused at once; a finished request frees a slot, however it ended."""
    front = await start("calm", **anonymous(concurrency=1))
    engine.trick = "hold"
    first = asyncio.create_task(front.chat())
    await engine.arrived.wait()
    assert (await front.chat())[0] == 429
    first.cancel()
    await asyncio.wait_for(engine.aborted.wait(), 5)
    engine.trick = ""
    meter = front.apps.gateway.limiter.meter(front.apps.gateway.settings.tenants[0])

    async def free() -> bool:
        return meter.in_flight == 0

    await until(free)
    assert (await front.chat())[0] == 200


async def test_disconnected_client_is_charged_for_the_engines_work(
    start: Start, engine: FakeEngine, until: Until
) -> None:
    """Disconnecting early does not make an answer free: the engine's receipt is fetched."""
    front = await start("calm", **anonymous(tokens_per_minute=100_000))
    engine.trick = "hold_stream"
    body = {"model": "tiny-model", "messages": [], "stream": True, "max_tokens": 5}
    answer = await front.public.post("/v1/chat/completions", json=body)
    await answer.content.readany()
    answer.close()
    meter = front.apps.gateway.limiter.meter(front.apps.gateway.settings.tenants[0])

    async def charged() -> bool:
        return b'interpretops_tenant_tokens_total{tenant="anonymous"} 3.0' in (
            front.apps.gateway.metrics.render()
        )

    await until(charged)
    assert meter.headers()["x-ratelimit-remaining-tokens"] in ("99997", "99998", "99999", "100000")
    assert engine.receipts == {}


async def test_charge_is_settled_whatever_asking_for_the_receipt_raises(
    start: Start, engine: FakeEngine, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error there leaves no tokens reserved."""
    front = await start("calm", **anonymous(token_budget=10_000))
    engine.trick = "hold_stream"
    body = {"model": "tiny-model", "messages": [], "stream": True, "max_tokens": 5}
    answer = await front.public.post("/v1/chat/completions", json=body)
    await answer.content.readany()
    meter = front.apps.gateway.limiter.meter(front.apps.gateway.settings.tenants[0])
    assert meter._reserved > 0

    async def fails(nonce: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(front.apps.gateway.fleet.current.client, "receipt", fails)
    answer.close()

    async def settled() -> bool:
        return meter._reserved == 0

    await until(settled)


async def test_malformed_requests_count_too(start: Start, engine: FakeEngine) -> None:
    """Malformed requests count as requests, but cost no tokens."""
    front = await start("calm", **anonymous(requests_per_minute=1, tokens_per_minute=1000))
    async with front.public.post("/v1/chat/completions", data=b"{", headers={"Content-Type": "text/x"}) as a:
        assert a.status == 415
    status, headers, body = await front.chat()
    assert (status, headers["x-ratelimit-remaining-tokens"]) == (429, "1000")
    assert json.dumps(body)


def test_unsaved_budget_is_logged_once(tmp_path: Path) -> None:
    """One log line per cause, a gauge while it lasts, and one line when it is over."""
    metrics, folder = Metrics(), tmp_path / "state"
    with structlog.testing.capture_logs() as log:
        budgets = Budgets(folder, metrics, structlog.get_logger())
        assert "interpretops_budgets_unsaved 0.0" in metrics.render().decode()
        shutil.rmtree(folder)
        folder.write_text("no folder any more")
        for _ in range(5):
            budgets.add("t", "day", 10)
            budgets.save()
            assert "interpretops_budgets_unsaved 1.0" in metrics.render().decode()
        folder.unlink()
        budgets.save()
        assert "interpretops_budgets_unsaved 0.0" in metrics.render().decode()
    assert [line["event"] for line in log] == ["budget_not_saved", "budget_saved_again"]
    assert json.loads((folder / "usage.json").read_bytes())["t"][1] == 50
