"""LiteLLM against a running server, by both APIs: BASE_URL MODEL."""

import json
import sys

import litellm

litellm.telemetry = False
litellm.suppress_debug_info = True
base_url, model = sys.argv[1:]
messages = [{"role": "user", "content": "Name three fruits."}]
parameters = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo"]}}, "required": ["city"], "additionalProperties": False}
weather = {"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": parameters}}
texts = []
for provider, address in [("openai", base_url), ("anthropic", base_url.removesuffix("/v1"))]:
    of = dict(model=f"{provider}/{model}", api_base=address, api_key="none", messages=messages, temperature=0, max_tokens=60)
    whole = litellm.completion(**of)
    texts.append(whole.choices[0].message.content)
    assert texts[-1] and whole.usage.completion_tokens
    pieces = litellm.completion(**of, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == texts[-1]
    called = litellm.completion(**of, tools=[weather], tool_choice="required", parallel_tool_calls=False).choices[0]
    (call,) = called.message.tool_calls
    assert called.finish_reason == "tool_calls" and call.function.name == "weather", called
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    try:
        litellm.completion(**{**of, "temperature": 1000})
    except litellm.BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("any temperature is taken")
assert texts[0] == texts[1]
print("ok")
