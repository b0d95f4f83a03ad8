"""Blocks of the KV cache: how many tokens they hold, and which are new in a step."""

from __future__ import annotations

from typing import Any

from interpretops.errors import PlanError


def count_slots(runner: Any) -> int:
    """Number of tokens that a runner's KV cache holds.

    Raises `PlanError` if the cache drops the beginning of prompts, or if there are several caches.
    """
    groups = runner.kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if kinds != ["FullAttentionSpec"]:
        raise PlanError(
            f"gates of scopes 'prompt' and 'answer' need one KV cache that holds whole prompts, but this "
            f"model has {kinds}; use scope 'prompt_end'"
        )
    return int(runner.kv_cache_config.num_blocks * groups[0].kv_cache_spec.block_size)


def cache_block_size(runner: Any) -> int:
    """Tokens per block, as the scheduler counts them, in a model with one KV cache (see `count_slots`)."""
    return int(runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)


def new_blocks(scheduler_output: Any, block_size: int) -> list[int]:
    """The blocks that requests receive in this step and that hold none of their tokens yet.

    Excludes prefix-cache hits, which come first among a request's blocks.
    """
    found: list[int] = []
    for new in scheduler_output.scheduled_new_reqs:
        found += new.block_ids[0][new.num_computed_tokens // block_size :]
    cached = scheduler_output.scheduled_cached_reqs
    for request_id, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if blocks is not None:  # a resumed request receives all its blocks, cache hits first
            hits = computed // block_size if request_id in cached.resumed_req_ids else 0
            found += blocks[0][hits:]
    return found
