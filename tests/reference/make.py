"""Small random checkpoints and what HF transformers computes with them.

Writes a folder for each model into tests/fixtures/models: config.json and model.safetensors as they are
published, cases.json with prompts, and reference.safetensors with the logits behind every token of each prompt.
The tests hold the engine to these files and need no Python.

    pip install -r tests/reference/requirements.txt
    python tests/reference/make.py            # writes the files
    python tests/reference/make.py --check    # makes them again and compares

Weights are made to show errors: norms are not 1, biases not 0, attention is peaked, logits are far from flat.
They are numbers that their stored format holds exactly. The reference runs in f32 with plain ("eager") attention.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "models"
VOCAB = 96
EOS = 95
WINDOW = 8
# One token, two, a window's edge and behind it, and many pages.
LENGTHS = [1, 2, 25, 61]
GREEDY = 12
# What another machine's arithmetic may change, as a part of a row's root mean square.
TOLERANCE = 1e-5
# How clearly a reference must prefer its token for a test to demand the same.
MARGIN = 1e-2


def base(architecture, model_type, **changes):
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": EOS,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value is not ...}


def case(length, max_model_len=None):
    return {"length": length, "max_model_len": max_model_len}


def plain_cases():
    return [case(length) for length in LENGTHS]


# Of each model: its configuration, the format of its weights, and its cases.
MODELS = {
    "llama-llama3": (
        base(
            "LlamaForCausalLM", "llama", head_dim=16, tie_word_embeddings=True,
            rope_scaling={
                "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        torch.bfloat16, plain_cases(),
    ),
    "llama-yarn": (
        base(
            "LlamaForCausalLM", "llama", num_key_value_heads=1, attention_bias=True, mlp_bias=True,
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        torch.float16, plain_cases(),
    ),
    "mistral-window": (
        base("MistralForCausalLM", "mistral", num_hidden_layers=3, sliding_window=WINDOW),
        torch.bfloat16, plain_cases(),
    ),
    "mistral-head-dim": (
        # As later releases write it: a head of its own width, no window, the rotary embedding in one table.
        base(
            "MistralForCausalLM", "mistral", head_dim=16, sliding_window=None, rope_theta=...,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        torch.bfloat16, plain_cases(),
    ),
    "mixtral-8-top-2": (
        base(
            "MixtralForCausalLM", "mixtral", intermediate_size=32, num_local_experts=8, num_experts_per_tok=2,
            sliding_window=None, rope_theta=1e6,
        ),
        torch.bfloat16, plain_cases(),
    ),
    "mixtral-4-top-3-window": (
        base(
            "MixtralForCausalLM", "mixtral", intermediate_size=32, num_local_experts=4, num_experts_per_tok=3,
            sliding_window=WINDOW,
        ),
        torch.bfloat16, plain_cases(),
    ),
    "mixtral-4-top-1": (
        base(
            "MixtralForCausalLM", "mixtral", intermediate_size=32, num_local_experts=4, num_experts_per_tok=1,
            sliding_window=None, head_dim=16,
        ),
        torch.bfloat16, plain_cases(),
    ),
    "qwen2": (
        # A window that isn't used, as most of the family's checkpoints state one.
        base(
            "Qwen2ForCausalLM", "qwen2", rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True,
            sliding_window=WINDOW, use_sliding_window=False, max_window_layers=1,
        ),
        torch.bfloat16, plain_cases(),
    ),
    "qwen2-window": (
        base(
            "Qwen2ForCausalLM", "qwen2", rms_norm_eps=1e-6, num_hidden_layers=3, sliding_window=WINDOW,
            use_sliding_window=True, max_window_layers=1,
        ),
        torch.bfloat16, plain_cases(),
    ),
    "qwen3": (
        base(
            "Qwen3ForCausalLM", "qwen3", rms_norm_eps=1e-6, rope_theta=1e6, head_dim=16, tie_word_embeddings=True,
            attention_bias=False, sliding_window=None, use_sliding_window=False, max_window_layers=2,
        ),
        torch.float32, plain_cases(),
    ),
    "phi3-window": (
        base(
            "Phi3ForCausalLM", "phi3", pad_token_id=EOS, original_max_position_embeddings=128, sliding_window=WINDOW,
            rope_scaling=None,
        ),
        torch.bfloat16, plain_cases(),
    ),
    "phi3-longrope": (
        # Heads of 16 columns, 12 of them rotated. Transformers takes the factors by the length of the prompt, the
        # engine by the longest session: each case says the one that gives the same.
        base(
            "Phi3ForCausalLM", "phi3", pad_token_id=EOS, hidden_size=48, num_attention_heads=3, num_key_value_heads=1,
            partial_rotary_factor=0.75, tie_word_embeddings=True, original_max_position_embeddings=32,
            sliding_window=None,
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0, 1.05, 1.1, 1.25, 1.5, 2.0],
                "long_factor": [1.0, 1.5, 2.25, 4.0, 6.5, 9.0],
            },
        ),
        torch.bfloat16,
        [case(1, 32), case(2, 32), case(20, 32), case(32, 32), case(33, 128), case(70, 128)],
    ),
}


def weight(name, shape, random):
    """A weight as it should be: large enough to matter, not so large that everything saturates."""
    values = random.standard_normal(shape)
    if len(shape) == 1 and "norm" in name:
        return random.uniform(0.5, 1.5, shape)
    if len(shape) == 1:
        return 0.5 * values
    if "embed_tokens" in name or "lm_head" in name:
        return values
    gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "gate.weight")) else 1.2
    return gain / np.sqrt(shape[-1]) * values


def make_checkpoint(folder, config, dtype, seed):
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
    model.float()
    random = np.random.Generator(np.random.PCG64(seed))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.from_numpy(weight(name, tuple(parameter.shape), random))
            parameter.copy_(values.to(dtype).float())
    # The library renames and splits to the names that are published.
    with tempfile.TemporaryDirectory() as published:
        model.save_pretrained(published)
        tensors = load_file(Path(published) / "model.safetensors")
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in sorted(tensors.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Reference:
    """A committed checkpoint in transformers."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model.eval()

    def logits(self, tokens):
        with torch.no_grad():
            output = self.model(torch.tensor([tokens]), use_cache=False)
        return output.logits[0].float()

    def greedy(self, tokens, count):
        """What follows `tokens`, as far as each token is clearly the best."""
        found = []
        while len(found) < count:
            row = self.logits(tokens + found)[-1]
            best = torch.topk(row, 2).values
            token = int(row.argmax())
            if (best[0] - best[1]) / row.square().mean().sqrt() < MARGIN or token == EOS:
                break
            found.append(token)
        return found


def make_reference(folder, cases, seed):
    reference = Reference(folder)
    random = np.random.Generator(np.random.PCG64(seed + 1000))
    listed, logits = [], {}
    for index, case in enumerate(cases):
        tokens = [int(token) for token in random.integers(0, EOS, case["length"])]
        room = (case["max_model_len"] or 128) - len(tokens)
        greedy = reference.greedy(tokens, min(GREEDY, room))
        listed.append({"max_model_len": case["max_model_len"], "tokens": tokens, "greedy": greedy})
        logits[f"case{index}.logits"] = reference.logits(tokens).contiguous()
    save_file(logits, folder / "reference.safetensors")
    lines = ",\n".join("  " + json.dumps(case) for case in listed)
    (folder / "cases.json").write_text(f"[\n{lines}\n]\n")
    return logits


def make(folder, name):
    config, dtype, cases = MODELS[name]
    seed = list(MODELS).index(name)
    folder.mkdir(parents=True, exist_ok=True)
    make_checkpoint(folder, config, dtype, seed)
    return make_reference(folder, cases, seed)


def check(committed, made):
    """What differs between two folders of one model."""
    problems = []
    for name in ["config.json", "cases.json"]:
        if (committed / name).read_text() != (made / name).read_text():
            problems.append(f"{name} differs")
    old, new = load_file(committed / "model.safetensors"), load_file(made / "model.safetensors")
    if old.keys() != new.keys() or any(not torch.equal(old[name], new[name]) for name in old):
        problems.append("model.safetensors has other weights")
    old, new = load_file(committed / "reference.safetensors"), load_file(made / "reference.safetensors")
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or old[name].shape != new[name].shape:
            problems.append(f"{name} is missing or has another shape")
            continue
        size = old[name].square().mean(dim=-1, keepdim=True).sqrt()
        error = float(((old[name] - new[name]).abs() / size).max())
        if error > TOLERANCE:
            problems.append(f"{name} is off by {error:.1e} of a row's size")
    return problems


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    arguments = arguments.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    failed = False
    for name in MODELS:
        if arguments.check:
            with tempfile.TemporaryDirectory() as made:
                make(Path(made), name)
                problems = check(FIXTURES / name, Path(made))
            failed |= bool(problems)
            print(f"{name}: {'; '.join(problems) or 'reproduces'}")
        else:
            logits = make(FIXTURES / name, name)
            spread = max(float(case.std()) for case in logits.values())
            size = sum(file.stat().st_size for file in (FIXTURES / name).iterdir())
            print(f"{name}: {size // 1024} KiB, logits spread by {spread:.1f}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
