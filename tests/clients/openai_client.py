"""The official OpenAI client, and LangChain over it, against a running server: BASE_URL MODEL."""

import sys

import openai
from langchain_openai import ChatOpenAI

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

for changes, kind, param in [
    ({"temperature": 1000}, openai.BadRequestError, "temperature"),
    ({"model": "nobody"}, openai.NotFoundError, "model"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
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

chain = ChatOpenAI(base_url=base_url, api_key="none", model=model, temperature=0, max_tokens=12, max_retries=0)
assert chain.invoke(messages).content == choice.message.content
assert "".join(piece.content for piece in chain.stream(messages)) == choice.message.content
print("ok")
