"""LangChain over OpenAI's API against a running server: BASE_URL MODEL."""

import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

base_url, model = sys.argv[1:]
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three fruits."}]
chain = ChatOpenAI(base_url=base_url, api_key="none", model=model, temperature=0, max_tokens=60, max_retries=0)
whole = chain.invoke(messages)
assert whole.content and whole.usage_metadata["output_tokens"]
assert "".join(piece.content for piece in chain.stream(messages)) == whole.content


class Weather(BaseModel):
    """Tells the weather."""

    city: Literal["Zürich", "Oslo"]


calling = chain.bind_tools([Weather], tool_choice="Weather", parallel_tool_calls=False)
called = calling.invoke(messages)
(call,) = called.tool_calls
assert call["name"] == "Weather" and Weather(**call["args"])
joined = None
for piece in calling.stream(messages):
    joined = piece if joined is None else joined + piece
assert [(call["name"], call["args"]) for call in joined.tool_calls] == [(call["name"], call["args"])]
answer = chain.bind_tools([Weather]).invoke([HumanMessage("Weather?"), called, ToolMessage("Rain", tool_call_id=call["id"])])
assert answer.usage_metadata["input_tokens"]
for method in ("json_schema", "function_calling"):
    assert isinstance(chain.with_structured_output(Weather, method=method).invoke(messages), Weather), method
print("ok")
