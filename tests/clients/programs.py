"""One client's tour of a gateway: `python programs.py CLIENT BASE_URL MODEL [tools] [away]`.

Prints one JSON object of what the client's user gets: a whole answer, a streamed one, a tool's call, and the
status of the errors that the client raises. With `away` it prints a second one for an engine that is away,
after a line came on standard input. Runs in an environment of its own: see `install.sh`.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUESTION = "What is the weather in Paris?"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
MESSAGES = [{"role": "user", "content": QUESTION}]


class OpenAI:
    """The `openai` package."""

    def __init__(self, url: str) -> None:
        import openai

        self.client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)

    def whole(self, model: str) -> str:
        return self._ask(model).choices[0].message.content

    def streamed(self, model: str) -> str:
        chunks = self._ask(model, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    def tool(self, model: str) -> tuple[str, str]:
        call = self._ask(model, tools=[TOOL]).choices[0].message.tool_calls[0].function
        return call.name, call.arguments

    def _ask(self, model: str, **more: Any) -> Any:
        return self.client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, **more)


class LiteLLM(OpenAI):
    """The `litellm` SDK, told that this is an OpenAI-compatible server."""

    def __init__(self, url: str) -> None:
        import litellm

        litellm.suppress_debug_info = True
        self.url, self.completion = url, litellm.completion

    def _ask(self, model: str, **more: Any) -> Any:
        return self.completion(
            model=f"openai/{model}",
            messages=MESSAGES,
            api_base=self.url,
            api_key="unused",
            max_tokens=8,
            num_retries=0,
            max_retries=0,
            **more,
        )


class LangChain:
    """`langchain-openai`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _model(self, model: str) -> Any:
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(model=model, base_url=self.url, api_key="unused", max_retries=0, max_tokens=8)

    def whole(self, model: str) -> str:
        return self._model(model).invoke(QUESTION).content

    def streamed(self, model: str) -> str:
        return "".join(chunk.content for chunk in self._model(model).stream(QUESTION))

    def tool(self, model: str) -> tuple[str, str]:
        (call,) = self._model(model).bind_tools([TOOL]).invoke(QUESTION).tool_calls
        return call["name"], json.dumps(call["args"])


class Llm:
    """`llm`, through its file of OpenAI-compatible models."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _model(self, name: str) -> Any:
        folder = Path(tempfile.mkdtemp())
        entry = {"model_id": "guarded", "model_name": name, "api_base": self.url, "supports_tools": True}
        (folder / "extra-openai-models.yaml").write_text(json.dumps([entry]))
        os.environ["LLM_USER_PATH"] = str(folder)
        os.environ["OPENAI_API_KEY"] = "unused"
        import llm

        return llm.get_model("guarded")

    def whole(self, model: str) -> str:
        return self._model(model).prompt(QUESTION, stream=False, max_tokens=8).text()

    def streamed(self, model: str) -> str:
        return "".join(self._model(model).prompt(QUESTION, max_tokens=8))

    def tool(self, model: str) -> tuple[str, str]:
        def weather(city: str) -> str:
            """Tell the weather."""
            return city

        (call,) = self._model(model).prompt(QUESTION, stream=False, tools=[weather]).tool_calls()
        return call.name, json.dumps(call.arguments)


CLIENTS: dict[str, Callable[[str], Any]] = {
    "openai": OpenAI,
    "litellm": LiteLLM,
    "langchain-openai": LangChain,
    "llm": Llm,
}


def status_of(call: Callable[[], object]) -> int | str:
    """The HTTP status of the error that the client raises."""
    try:
        return f"no error: {call()!r}"
    except Exception as error:
        return getattr(error, "status_code", f"{type(error).__name__}: {error}")


def main(name: str, url: str, model: str, *more: str) -> None:
    """Make the tour."""
    client = CLIENTS[name](url)
    seen = {
        "whole": client.whole(model),
        "streamed": client.streamed(model),
        "mandatory": status_of(lambda: client.whole(f"{model}+none")),
        "unknown": status_of(lambda: client.whole("gpt-4o")),
    }
    if "tools" in more:
        name, arguments = client.tool(model)
        seen["tool"] = [name, json.loads(arguments)]
    print(json.dumps(seen), flush=True)
    if "away" in more:
        sys.stdin.readline()
        print(json.dumps({"away": status_of(lambda: client.whole(model))}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
