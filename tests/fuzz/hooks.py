"""Has most valid requests reach the engine.

What is valid by the schema alone is mostly refused for what a schema can't say: a model that isn't served, two fields that
exclude each other, a role that can't have a field. So three in four requests keep but a few of the fields that were
generated, beside a conversation or prompt that can be answered; the others stay as they were generated.
"""

import json
import random

import schemathesis

CONVERSATION = [{"role": "user", "content": "Hello"}]
BASES = {
    "/v1/chat/completions": {"messages": CONVERSATION, "max_tokens": 4},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 4},
    "/v1/messages": {"model": "served", "messages": CONVERSATION, "max_tokens": 4},
    "/v1/messages/count_tokens": {"model": "served", "messages": CONVERSATION},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [1, 2]},
}


@schemathesis.hook
def map_case(context, case):
    base = BASES.get(case.path)
    if base is None or not isinstance(case.body, dict) or case.meta.generation.mode.is_negative:
        return case
    body = whole_numbers(case.body)
    rng = random.Random(json.dumps(body, sort_keys=True, default=str))
    if rng.random() < 0.75:
        names = sorted(set(body) - {"model"})
        body = {**base, **{name: body[name] for name in rng.sample(names, min(len(names), rng.randint(0, 3)))}}
        # Many answers would show nothing further.
        if type(body.get("n")) is int and body["n"] > 4:
            body["n"] = 4
        if body.get("stream_options") is not None:
            body["stream"] = True
    case.body = body
    return case


def whole_numbers(value):
    """A JSON schema takes 1.0 for an integer, which the server doesn't."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole_numbers(item) for item in value]
    if isinstance(value, dict):
        return {name: whole_numbers(item) for name, item in value.items()}
    return value
