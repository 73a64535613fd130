"""Prefill and decode of a model by the package vllm: one JSON object. Run by `bench/compare.py`.

Prompts are random tokens, so that none is found in a prefix cache; the time of one token is taken off that of many.
"""

import json
import random
import sys
import time

import vllm
from vllm import LLM, SamplingParams, TokensPrompt

DECODE = 128


def main():
    path, rounds = sys.argv[1], int(sys.argv[2])
    # Its default wants nearly all of the memory to be free.
    memory = {"gpu_memory_utilization": 0.5}
    model = LLM(
        model=path, enable_prefix_caching=False, max_model_len=1024, max_num_seqs=1, disable_log_stats=True, **memory
    )
    vocabulary = len(model.get_tokenizer())
    source = random.Random(1)

    def seconds(prompt, tokens):
        prompt = TokensPrompt(prompt_token_ids=[source.randrange(vocabulary) for _ in range(prompt)])
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0, detokenize=False)
        start = time.perf_counter()
        model.generate([prompt], params, use_tqdm=False)
        return time.perf_counter() - start

    seconds(16, 4)
    prefill = [512 / seconds(512, 1) for _ in range(rounds)]
    decode = [DECODE / (seconds(1, DECODE + 1) - seconds(1, 1)) for _ in range(rounds)]
    print(json.dumps({"version": vllm.__version__, "prefill": prefill, "decode": decode}))


if __name__ == "__main__":
    main()
