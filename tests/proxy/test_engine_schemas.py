"""The engine's own request classes read what we send: every field is known, and the seal arrives."""

import pytest

from proxy.routes import ROUTES
from proxy.sanitize import clean

SEAL = {"interpretops_revision": "a" * 64, "interpretops_nonce": "b" * 32}
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "hi", "max_tokens": 4},
    "/v1/responses": {"input": "hi", "instructions": "be kind", "max_output_tokens": 4},
    "/v1/messages": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "system": "be kind",
        "max_tokens": 4,
    },
}


@pytest.fixture(scope="module")
def schemas():
    """The engine's class for the requests of each route; several where the body decides."""
    from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.tokenize import protocol

    return {
        "/v1/chat/completions": (ChatCompletionRequest,),
        "/v1/completions": (CompletionRequest,),
        "/v1/responses": (ResponsesRequest,),
        "/v1/messages": (AnthropicMessagesRequest,),
        "/v1/messages/count_tokens": (AnthropicCountTokensRequest,),
        "/tokenize": (protocol.TokenizeCompletionRequest, protocol.TokenizeChatRequest),
        "/detokenize": (protocol.DetokenizeRequest,),
    }


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_that_passes_is_one_the_engine_reads(schemas, path):
    """A field of our lists that the engine does not know would be dropped there without a word."""
    known = set().union(*(schema.model_fields for schema in schemas[path]))
    assert ROUTES[path].fields.keys() - known == set()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_seal_reaches_the_sampling_parameters(schemas, path, stream):
    """What the plugin reads to admit a request is, on every route, exactly what the gateway set."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    from steering_kernels.vllm_plugin.request_args import RequestArgs

    body = clean(ROUTES[path], {"model": "m", "stream": stream, "temperature": 0.5, **BODIES[path]})
    request = schemas[path][0].model_validate({**body, "cache_salt": "s", "vllm_xargs": SEAL})
    if path == "/v1/messages":
        request = AnthropicServingMessages.to_chat_completion_request(request)
    params = request.to_sampling_params(4, {})
    assert params.extra_args == SEAL
    assert RequestArgs.read(params.extra_args).revision == "a" * 64
    assert (params.temperature, params.max_tokens) == (0.5, 4)
    assert request.cache_salt == "s"


def test_every_generating_route_is_read(schemas):
    """No route that runs the model is missing here."""
    assert {path for path, route in ROUTES.items() if route.generates} == BODIES.keys()
    assert schemas.keys() == ROUTES.keys()
