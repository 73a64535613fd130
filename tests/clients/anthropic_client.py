"""Anthropic's own client against a running server: BASE_URL MODEL."""

import sys

import anthropic

base_url, model = sys.argv[1:]
client = anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key="none", max_retries=0)
# The client has no name for the temperature, which the server still takes.
greedy = {"temperature": 0}
asked = dict(model=model, max_tokens=60, extra_body=greedy, system="Be brief.", messages=[{"role": "user", "content": "Name three fruits."}])

whole = client.messages.create(**asked)
assert whole.type == "message" and whole.role == "assistant" and whole.stop_reason in ("end_turn", "max_tokens")
assert whole.content[0].type == "text" and whole.content[0].text
counted = client.messages.count_tokens(**{name: asked[name] for name in ("model", "system", "messages")})
assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens

with client.messages.stream(**asked) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert text == whole.content[0].text == final.content[0].text and final.stop_reason == whole.stop_reason
assert final.usage.output_tokens == whole.usage.output_tokens

stop = text[2:5]
stopped = client.messages.create(**asked, stop_sequences=["§", stop])
assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop) and stopped.content[0].text == text[: text.index(stop)]

schema = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Zürich", "Oslo"]}}, "required": ["city"], "additionalProperties": False}
tools = [{"name": "weather", "description": "Tells the weather.", "input_schema": schema}]
choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
called = client.messages.create(**asked, tools=tools, tool_choice=choice)
(block,) = called.content
assert called.stop_reason == "tool_use" and block.type == "tool_use" and block.input["city"] in ("Zürich", "Oslo")
with client.messages.stream(**asked, tools=tools, tool_choice=choice) as stream:
    streamed = stream.get_final_message()
assert streamed.content[0].input == block.input and streamed.stop_reason == "tool_use"
# The call goes back as it came, with its answer.
answered = [*asked["messages"], {"role": "assistant", "content": called.content}]
answered.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": block.id, "content": "Rain"}]})
assert client.messages.create(**{**asked, "messages": answered}, tools=tools).usage.output_tokens

for changes, kind, part in [
    ({"model": "nobody"}, anthropic.NotFoundError, "nobody"),
    ({"extra_body": {"temperature": 1000}}, anthropic.BadRequestError, "temperature"),
    ({"extra_body": {"temprature": 1}}, anthropic.BadRequestError, "did you mean `temperature`"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]}, anthropic.BadRequestError, "image"),
]:
    try:
        client.messages.create(**{**asked, **changes})
    except kind as error:
        assert error.body["type"] == "error" and part in error.body["error"]["message"], (changes, error)
    else:
        raise AssertionError(f"{changes} is taken")

# A stream that is left in the middle.
with client.messages.stream(**{**asked, "max_tokens": 1000}) as stream:
    next(iter(stream))
print("ok")
