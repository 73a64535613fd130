"""Log-likelihoods that lm-eval has of `/v1/completions`, against HF transformers' on the same unquantized weights.

check.py SETU MODEL.gguf FOLDER writes the model into FOLDER as transformers reads it, in 32-bit floats, has both evaluate the
passages beside this file, and fails if a token's log-likelihoods differ by 0.02 or more.
"""

import json
import pathlib
import re
import subprocess
import sys
import urllib.request

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

MOST = 0.02


def convert(gguf: pathlib.Path, folder: pathlib.Path):
    if (folder / "model.safetensors").exists():
        return
    named = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32)
    # One that was read from a GGUF file can't be written; its twin can.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**named), dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**named).save_pretrained(folder)


def evaluate(tasks: TaskManager, model: str, arguments: dict) -> list[tuple[float, bool, str]]:
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=["setu_passages"], task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    print(model, {name: value for name, value in found["results"]["setu_passages"].items() if "stderr" not in name})
    samples = sorted(found["samples"]["setu_passages"], key=lambda sample: sample["doc_id"])
    return [(*sample["filtered_resps"][0], sample["doc"]["target"]) for sample in samples]


def main():
    setu, gguf, folder = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    here = pathlib.Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    convert(gguf, folder)
    task = folder / "task"
    task.mkdir(exist_ok=True)
    (task / "task.yaml").write_text((here / "task.yaml").read_text().replace("PASSAGES", str(here / "passages.jsonl")))
    tasks = TaskManager(include_path=str(task))

    server = subprocess.Popen([setu, "serve", str(folder), "--server.port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        address = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
        with urllib.request.urlopen(f"{address}/v1/models") as models:
            name = json.load(models)["data"][0]["id"]
        arguments = {"model": name, "base_url": f"{address}/v1/completions", "tokenizer": str(folder), "num_concurrent": 4}
        ours = evaluate(tasks, "local-completions", arguments)
    finally:
        server.terminate()
    theirs = evaluate(tasks, "hf", {"pretrained": str(folder), "dtype": "float32", "device": "cpu"})

    tokenizer = AutoTokenizer.from_pretrained(folder)
    worst = 0.0
    for (own, own_greedy, target), (reference, greedy, _) in zip(ours, theirs, strict=True):
        tokens = len(tokenizer(target, add_special_tokens=False).input_ids)
        worst = max(worst, abs(own - reference) / tokens)
        assert own_greedy == greedy, f"{target!r}: greedy {own_greedy}, by transformers {greedy}"
    print(f"{len(ours)} passages, worst difference of log-likelihood {worst:.6f} a token")
    assert worst < MOST, f"over {MOST}"


main()
