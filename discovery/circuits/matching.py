"""Makes contrast pairs: pairs each prompt that shows a behaviour with a harmless prompt that we ship."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from discovery.circuits.pairs import CLASS_ANSWERS, TextPair
from discovery.data.sources import Source, read_prompts
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel

PROMPTS = Path(__file__).resolve().parents[1] / "prompts"
CONTRAST = PROMPTS / "contrast.yaml"
SELF_ASKED = PROMPTS / "self-asked.json"


def match_prompts(
    model: FrozenModel,
    path: Path,
    target_class: str,
    *,
    chat: bool,
    most: int | None = None,
    answers: tuple[str, ...] = (),
    wrong: tuple[str, ...] = (),
) -> tuple[list[TextPair], int]:
    """Pairs of a file's prompts with shipped harmless ones, and the number of prompts without a partner.

    most: the largest number of pairs. If there are more, pairs of the most common lengths come first, because
    pairs of equal length run together; then the most similar pairs
    answers, wrong: the answers that all pairs are measured by; if empty, the class's known answers

    Patching works position by position, so a partner must have as many tokens as its prompt. The partner with
    the most equal tokens at equal positions is chosen. No harmless prompt is used twice.
    """
    prompts = list(dict.fromkeys(read_prompts(Source(path, "prompts"))))
    encode = model.chat_ids if chat else model.text_ids
    harmless = _harmless(target_class)
    by_length: dict[int, dict[str, list[int]]] = {}
    for text in harmless:
        ids = encode(text)
        by_length.setdefault(len(ids), {})[text] = ids
    answers, wrong = _class_answers(target_class, answers, wrong)
    tokens = {text: encode(text) for text in prompts}
    likeness = {
        (prompt, text): sum(a == b for a, b in zip(ids, other, strict=True))
        for prompt, ids in tokens.items()
        for text, other in by_length.get(len(ids), {}).items()
        if text != prompt
    }
    partner: dict[str, str] = {}
    taken: set[str] = set()
    for prompt, text in sorted(likeness, key=lambda pair: -likeness[pair]):  # ties: in the files' order
        if prompt not in partner and text not in taken:
            partner[prompt] = text
            taken.add(text)
    if not partner:
        raise DiscoveryError(
            f"{path}: no prompt has as many tokens as one of our {len(harmless)} harmless ones; "
            "write shorter prompts, or pairs of your own (--pairs)"
        )
    lengths = Counter(len(tokens[prompt]) for prompt in partner)

    def rank(prompt: str) -> tuple[int, int, int]:
        length = len(tokens[prompt])
        return -lengths[length], length, -likeness[prompt, partner[prompt]]

    chosen = set(sorted(partner, key=rank)[:most])
    pairs = [
        TextPair(f"{path}: prompt {index + 1}", prompt, partner[prompt], answers, wrong)
        for index, prompt in enumerate(prompts)
        if prompt in chosen
    ]
    return pairs, len(prompts) - len(partner)


def _harmless(target_class: str) -> list[str]:
    """Shipped harmless prompts: first those of the class, then those that sound harmful, then any."""
    found = [str(row["corrupted"]) for row in _class_rows(target_class)]
    found += read_prompts(Source(CONTRAST, "prompts", name="benign"))
    found += read_prompts(Source(SELF_ASKED, "prompts"))
    return list(dict.fromkeys(found))


def _class_rows(target_class: str) -> list[dict[str, object]]:
    """The shipped contrast pairs of a class, if there are any."""
    shipped = {path.stem: path for path in sorted((PROMPTS / "pairs").glob("*.jsonl"))}
    path = shipped.get(target_class)
    if path is None:
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _class_answers(
    target_class: str, answers: Sequence[str], wrong: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The given answers, else those of the class's shipped pairs, else the class's known ones."""
    rows = _class_rows(target_class)
    known = (rows[0]["answer"], rows[0]["wrong"]) if rows else CLASS_ANSWERS.get(target_class, ((), ()))
    found = []
    for option, given, fallback in (("answer", answers, known[0]), ("wrong", wrong, known[1])):
        texts = tuple(given) or tuple(map(str, fallback if isinstance(fallback, list | tuple) else ()))
        if not texts:
            raise DiscoveryError(
                f"--class {target_class}: this class has no known answers; give --{option} (may be repeated)"
            )
        found.append(texts)
    return found[0], found[1]
