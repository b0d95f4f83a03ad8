"""The blocks of the key-value cache: how many tokens they hold, and which of them are new in a step."""

from __future__ import annotations

from typing import Any

from interpretops.errors import PlanError


def count_slots(runner: Any) -> int:
    """Tokens that a runner's key-value cache holds.

    Raises `PlanError` where the cache forgets the beginning of a prompt, or there are several.
    """
    groups = runner.kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if kinds != ["FullAttentionSpec"]:
        raise PlanError(
            f"gates of scope 'prompt' need one key-value cache that holds whole prompts, but this model has "
            f"{kinds}; use scope 'prompt_end'"
        )
    return int(runner.kv_cache_config.num_blocks * groups[0].kv_cache_spec.block_size)


def cache_block_size(runner: Any) -> int:
    """Tokens of a block as the scheduler counts them, in a model with one key-value cache (`count_slots`)."""
    return int(runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)


def new_blocks(scheduler_output: Any, block_size: int) -> list[int]:
    """The blocks that requests get in this step and that hold nothing of theirs yet.

    Blocks that a new request found in the prefix cache come first among its blocks, and are not of them.
    """
    found: list[int] = []
    for new in scheduler_output.scheduled_new_reqs:
        found += new.block_ids[0][new.num_computed_tokens // block_size :]
    cached = scheduler_output.scheduled_cached_reqs
    for request_id, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        if blocks is not None:  # a resumed request is given all of its blocks, found ones first
            hits = computed // block_size if request_id in cached.resumed_req_ids else 0
            found += blocks[0][hits:]
    return found
