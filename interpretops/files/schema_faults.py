"""Turns pydantic's errors into lines that name file, field, value and remedy."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from interpretops.files.strict_yaml import Document, KeyPath, show_path


def describe_faults(error: ValidationError, document: Document, model: type[BaseModel]) -> tuple[str, ...]:
    """One line per fault: ``file: path = value, but ... (line N)``."""
    lines: list[str] = []
    for item in error.errors(include_url=False):
        path = _path_in_file(item, document.data)
        for text in _texts(item, path, model, document):
            lines.append(f"{document.source}: {text}")
    return tuple(dict.fromkeys(lines))


def _path_in_file(item: ErrorDetails, data: Any) -> KeyPath:
    """The error's path without the tags that pydantic adds for the intervention type."""
    path: list[str | int] = []
    for position, part in enumerate(item["loc"]):
        last = position == len(item["loc"]) - 1
        if isinstance(data, dict):
            if part == "[key]":
                continue
            if part in data:
                data = data[part]
            elif not last or item["type"] != "missing":
                continue
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _texts(item: ErrorDetails, path: KeyPath, model: type[BaseModel], document: Document) -> list[str]:
    where, kind, context = document.where(path), item["type"], item.get("ctx", {})
    name = show_path(path)
    if kind == "missing":
        return [f"{name} is missing{where}"]
    if kind == "extra_forbidden":
        known = _known_keys(item["loc"][:-1], model)
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return [f"{name} is not a known key; {remedy}{where}"]
    if kind == "value_error":
        reason = str(context.get("error", item["msg"]))
        if not path:
            return reason.splitlines()
        joint = "." if "=" in reason.split(" ", 2)[1:2] else " "
        return [f"{name}{joint}{reason}{where}"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        expected = context.get("expected_tags") or "feature_scale, feature_clamp, …"
        tag = f"= {context['tag']!r}" if "tag" in context else "is missing"
        return [f"{name}.type {tag}, but must be one of {expected}{where}"]
    if kind in ("too_short", "too_long") and isinstance(item["input"], list | dict | tuple):
        least, most = context.get("min_length", 0), context.get("max_length", float("inf"))
        if least <= len(item["input"]) <= most:
            return []  # pydantic counts only the entries without faults; those faults have their own lines
        bound = f"at least {least}" if kind == "too_short" else f"at most {most}"
        return [f"{name} has {len(item['input'])} entries, but must have {bound}{where}"]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return [f"{name} = {_show_value(item['input'])}, but must be a mapping of keys to values{where}"]
    message = item["msg"][:1].lower() + item["msg"][1:]
    message = message.replace("input should be ", "must be ").replace("input should have ", "must have ")
    message = message.replace("input should ", "must ")
    message = message.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")
    return [f"{name} = {_show_value(item['input'])}, but {message}{where}"]


def _show_value(value: Any) -> str:
    """The value as YAML: text in quotes, so that '1' and 1 look different, and true, false, null."""
    words = {"True": "true", "False": "false", "None": "null"}
    text = words[repr(value)] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _known_keys(location: tuple[str | int, ...], model: type[BaseModel]) -> list[str]:
    """Keys allowed at a path, found by walking the schema along pydantic's location."""
    candidates: list[Any] = [model]
    for part in location:
        step: list[Any] = []
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                if part in candidate.model_fields:
                    step += _models_in(candidate.model_fields[str(part)].annotation)
                elif part in _tags(candidate):
                    step.append(candidate)
        candidates = step or candidates
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("type")
    return () if field is None else get_args(field.annotation)
