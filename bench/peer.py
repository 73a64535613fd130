"""transformers with a static cache and compiled, on models of given shapes with random weights: one JSON object.

Run by `scripts/gpu.sh`; needs torch and transformers. Times are medians, measured with events on the device.
"""

import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache, __version__

PROMPTS = [512, 2048]
BATCHES = [1, 8, 32]
CONTEXT = 512
STEPS = 16


def median_s(run, times):
    found = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return sorted(found)[len(found) // 2]


def measure(folder):
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16).eval()
    prefill, decode = [], []
    for tokens in PROMPTS:
        ids = torch.randint(0, config.vocab_size, (1, tokens), device="cuda")
        # Only the last token's logits are wanted, as in an engine.
        run = lambda: model(ids, use_cache=True, logits_to_keep=1)
        run()
        seconds = median_s(run, 5)
        prefill.append({"tokens": tokens, "tokens_per_s": tokens / seconds, "device_s": seconds})
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    for batch in BATCHES:
        cache = StaticCache(
            config=config, max_batch_size=batch, max_cache_len=CONTEXT + 256, device="cuda", dtype=torch.bfloat16
        )
        ids = torch.randint(0, config.vocab_size, (batch, CONTEXT), device="cuda")
        model(ids, past_key_values=cache, cache_position=torch.arange(CONTEXT, device="cuda"), logits_to_keep=1)
        token = ids[:, :1].clone()
        place = torch.tensor([CONTEXT], device="cuda")

        def run():
            logits = step(token, past_key_values=cache, cache_position=place).logits
            token.copy_(logits[:, -1:].argmax(-1))
            place.add_(1)

        for _ in range(4):
            run()
        seconds = median_s(run, STEPS)
        decode.append({"batch": batch, "context": CONTEXT, "tokens_per_s": batch / seconds, "device_s": seconds})
    return {"model": folder.rstrip("/").split("/")[-1], "prefill": prefill, "decode": decode}


def main():
    models = []
    with torch.inference_mode():
        for folder in sys.argv[1:]:
            try:
                models.append(measure(folder))
            except Exception as error:  # A peer that fails must not end the measurement.
                models.append({"model": folder, "error": f"{type(error).__name__}: {error}"})
            torch.cuda.empty_cache()
    print(json.dumps({"torch": torch.__version__, "transformers": __version__, "models": models}))


if __name__ == "__main__":
    main()
