"""Variants of a request, as different people send it: in another case, with a typo, after an earlier turn.

Some variants have no chat format (`/v1/completions`). Some prefill the answer: they end with an assistant
message that the model continues.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from discovery.data.rewritten_requests import rewritten
from discovery.data.sources import Prompt
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel

ANSWER_MARK = "\nAssistant: "
"""Separates the user's and the assistant's words in an earlier turn."""
TEXT = "text"
"""The role of a request in plain text, without the chat format."""
REWRITTEN = 0.12
"""Share of requests that are rewritten, see `rewritten`."""
Message = dict[str, str]


@dataclass(frozen=True)
class Surroundings:
    """What may come before a request in a conversation."""

    system_prompts: tuple[str, ...] = ()
    earlier_turns: tuple[str, ...] = ()
    answer_openings: tuple[str, ...] = ()
    """Possible beginnings of a prefilled answer."""

    def check(self) -> None:
        """Raise `DiscoveryError` for an earlier turn without an answer."""
        for turn in self.earlier_turns:
            if ANSWER_MARK not in turn:
                raise DiscoveryError(f"earlier_turns: {turn!r} has no line that begins with 'Assistant: '")


def messages_of(prompt: Prompt) -> list[Message]:
    """A prompt as the messages of a chat, unchanged."""
    turns = (("user", prompt),) if isinstance(prompt, str) else prompt
    return [{"role": role, "content": content} for role, content in turns]


def words_of(prompt: Prompt) -> str:
    """All that the user says in a prompt."""
    return "\n".join(message["content"] for message in messages_of(prompt) if message["role"] == "user")


def conversation(request: Prompt, surroundings: Surroundings, chance: random.Random) -> list[Message]:
    """The messages of one variant; most variants are only the unchanged request.

    A request that is a conversation stays as it is.
    """
    if not isinstance(request, str):
        return messages_of(request)
    text, at = request, chance.random()
    if at < 0.06:
        text = request.lower()
    elif at < 0.10:
        text = request.rstrip(".?!") or request
    elif at < 0.14:
        text = _with_slips(request, chance)
    elif at < 0.16:
        text = request.upper()
    elif at < 0.16 + REWRITTEN:
        text = rewritten(request, chance)
    messages = [{"role": "user", "content": text}]
    at = chance.random()
    if at < 0.03:
        return [{"role": TEXT, "content": text}]
    if at < 0.06 and surroundings.answer_openings:
        return [*messages, {"role": "assistant", "content": chance.choice(surroundings.answer_openings)}]
    at = chance.random()
    if at < 0.08 and surroundings.system_prompts:
        return [{"role": "system", "content": chance.choice(surroundings.system_prompts)}, *messages]
    if at > 0.94 and surroundings.earlier_turns:
        question, _, answer = chance.choice(surroundings.earlier_turns).partition(ANSWER_MARK)
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
            *messages,
        ]
    return messages


def conversation_ids(model: FrozenModel, messages: Sequence[Message]) -> tuple[int, ...]:
    """Token ids of a conversation in the model's chat format; without a chat format, of its last message.

    The model continues a final assistant message.
    """
    if messages[0]["role"] == TEXT or not model.has_chat_template:
        return tuple(model.text_ids(messages[-1]["content"]))
    return tuple(model.conversation_ids(messages))


def _with_slips(text: str, chance: random.Random) -> str:
    """Swap neighbouring letters, about one pair in 25."""
    letters = list(text)
    for _ in range(max(1, len(letters) // 25)):
        if len(letters) > 1:
            place = chance.randrange(len(letters) - 1)
            letters[place : place + 2] = reversed(letters[place : place + 2])
    return "".join(letters)
