"""Prefill and decode of a GGUF file by the package mistralrs: one JSON object. Run by `bench/compare.py`.

Rates are the engine's own, of the usage that it reports. Prompts differ from one another, and there is no prefix cache.
"""

import importlib.metadata
import json
import random
import sys
from pathlib import Path

from mistralrs import CompletionRequest, Runner, Which

WORDS = "time year people way day man thing woman life child world school state family".split()


def main():
    path, rounds = Path(sys.argv[1]), int(sys.argv[2])
    which = Which.GGUF(tok_model_id=None, quantized_model_id=str(path.parent), quantized_filename=path.name)
    runner = Runner(which=which, prefix_cache_n=0)
    source = random.Random(1)

    def usage(words, tokens):
        prompt = " ".join(source.choices(WORDS, k=words))
        request = CompletionRequest(model="default", prompt=prompt, max_tokens=tokens, temperature=0.0)
        return runner.send_completion_request(request).usage

    usage(16, 4)
    prefill = [usage(511, 1).avg_prompt_tok_per_sec for _ in range(rounds)]
    decode = [usage(1, 128).avg_compl_tok_per_sec for _ in range(rounds)]
    print(json.dumps({"version": importlib.metadata.version("mistralrs"), "prefill": prefill, "decode": decode}))


if __name__ == "__main__":
    main()
