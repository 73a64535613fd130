"""OpenAI's own client against a running server, which takes four sessions at once: BASE_URL MODEL."""

import json
import sys
import threading
import time

import openai

base_url, model = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three fruits."}]
greedy = dict(model=model, messages=messages, temperature=0, max_completion_tokens=12)

assert model in [found.id for found in client.models.list()]
assert client.models.retrieve(model).id == model

whole = client.chat.completions.create(**greedy, logprobs=True, top_logprobs=3)
choice = whole.choices[0]
assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason in ("stop", "length")
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
pieces = b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode()
assert pieces.startswith(choice.message.content), (pieces, choice.message.content)
assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)

# What was answered can be sent back as it came.
again = [*messages, choice.message.model_dump(), {"role": "user", "content": "And three more."}]
assert client.chat.completions.create(**{**greedy, "messages": again}).choices[0].message.content

text, usage = "", None
for chunk in client.chat.completions.create(**greedy, stream=True, stream_options={"include_usage": True}):
    text += "".join(choice.delta.content or "" for choice in chunk.choices)
    usage = chunk.usage or usage
assert text == choice.message.content and usage == whole.usage.model_copy(
    update={"prompt_tokens_details": usage.prompt_tokens_details}
), (text, usage)

several = client.chat.completions.create(**{**greedy, "temperature": 1.0}, n=3, seed=5, stop=["\n"])
assert [choice.index for choice in several.choices] == [0, 1, 2]

echoed = client.completions.create(model=model, prompt="One, two,", max_tokens=1, temperature=0, echo=True, logprobs=1)
assert echoed.choices[0].text.startswith("One, two,") and echoed.choices[0].logprobs.token_logprobs[0] is None

city = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Zürich", "Oslo"]}}, "required": ["city"], "additionalProperties": False}
weather = {"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": city, "strict": True}}
asked = dict(greedy, tools=[weather], tool_choice={"type": "function", "function": {"name": "weather"}}, parallel_tool_calls=False)
asked["max_completion_tokens"] = 60
called = client.chat.completions.create(**asked).choices[0]
call = called.message.tool_calls[0]
assert called.finish_reason == "tool_calls" and called.message.content is None and len(called.message.tool_calls) == 1
assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Zürich", "Oslo")
with client.chat.completions.stream(**asked) as stream:
    for event in stream:
        pass
    streamed = stream.get_final_completion().choices[0]
assert streamed.message.tool_calls[0].function.arguments == call.function.arguments and streamed.finish_reason == "tool_calls"
# The call goes back as it came, with its answer.
answered = [*messages, called.message, {"role": "tool", "tool_call_id": call.id, "content": "Rain"}]
assert client.chat.completions.create(**{**greedy, "messages": answered}, tools=[weather]).usage.completion_tokens

form = {"type": "json_schema", "json_schema": {"name": "place", "schema": city, "strict": True}}
place = client.chat.completions.create(**{**greedy, "max_completion_tokens": 60}, response_format=form)
assert json.loads(place.choices[0].message.content)["city"] in ("Zürich", "Oslo")

for changes, kind, param in [
    ({"temperature": 1000}, openai.BadRequestError, "temperature"),
    ({"model": "nobody"}, openai.NotFoundError, "model"),
    ({"functions": [{"name": "f"}]}, openai.BadRequestError, "functions"),
    ({"tools": [weather, weather]}, openai.BadRequestError, "tools[1].function.name"),
    ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
]:
    try:
        client.chat.completions.create(**{**greedy, **changes})
    except kind as error:
        assert error.param == param, (changes, error)
    else:
        raise AssertionError(f"{changes} is taken")

# A stream that is left in the middle.
with client.chat.completions.create(**{**greedy, "max_completion_tokens": 1000}, stream=True) as stream:
    next(iter(stream))

# A full server says when to come again, and the client does.
time.sleep(0.5)
long = dict(greedy, max_completion_tokens=1500, stream=True, extra_body={"ignore_eos": True})
streams = [client.chat.completions.create(**long) for _ in range(4)]
for stream in streams:
    next(iter(stream))
try:
    client.chat.completions.create(**greedy)
except openai.RateLimitError as error:
    assert int(error.response.headers["retry-after"]) >= 1
else:
    raise AssertionError("a full server takes more")
threading.Timer(0.5, lambda: [stream.close() for stream in streams]).start()
patient = client.with_options(max_retries=5)
assert patient.chat.completions.create(**greedy).choices[0].message.content == choice.message.content
print("ok")
