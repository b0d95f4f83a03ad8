"""A caller's variables reach the chat template, but never the arguments of the function that renders it."""

import inspect

import pytest
from transformers import PreTrainedTokenizerBase

from proxy.errors import FieldNotAllowed, InvalidRequest
from proxy.openai_api.request_body import clean
from proxy.openai_api.routes import ROUTES
from proxy.openai_api.template_kwargs import FIELD, RESERVED

TAKING = [path for path, route in ROUTES.items() if FIELD in route.fields]


def body(variables: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], "input": "hi", FIELD: variables}


def asked(path: str, variables: object) -> dict[str, object]:
    route = ROUTES[path]
    given = {name: value for name, value in body(variables).items() if name in route.fields}
    return clean(route, given)


def test_every_argument_of_the_renderer_is_refused() -> None:
    """A new argument of transformers' `apply_chat_template` fails this test."""
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.values()
    named = {one.name for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD}
    assert named <= RESERVED


@pytest.mark.parametrize("path", TAKING)
@pytest.mark.parametrize("name", [*sorted(RESERVED), "eos_token", "additional_special_tokens"])
def test_variable_that_controls_the_prompt_is_refused(path: str, name: str) -> None:
    """`padding`, for example, would append special tokens to the prompt; such names are refused on every
    route."""
    with pytest.raises(FieldNotAllowed, match=name):
        asked(path, {"enable_thinking": False, name: True})


@pytest.mark.parametrize("path", TAKING)
def test_variables_of_templates_pass(path: str) -> None:
    """Variables of templates pass unchanged."""
    variables = {"enable_thinking": False, "thinking_budget": 100, "date_string": "today", "max_tokens": 3}
    assert asked(path, variables)[FIELD] == variables
    with pytest.raises(InvalidRequest, match="must be an object"):
        asked(path, ["tokenize"])
