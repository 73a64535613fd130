#!/usr/bin/env bash
# What only a GPU can tell, in one command: all tests of the CUDA backend on the device, then its speed beside what the
# device can do at most. Writes one JSON into bench/results/, of which bench/report.py makes docs/gpu.md.
#
#   scripts/gpu.sh                  builds and runs, in a checkout on a machine with a GPU
#   scripts/gpu.sh --pack FOLDER    builds on any machine, and puts what is to be run into FOLDER
#   scripts/gpu.sh --from FOLDER    runs what another machine has packed; no toolchain is needed
#   scripts/gpu.sh --emulated       tries all of it on the emulated driver with a tiny model; no figure means anything
#
# NVRTC is needed (the CUDA toolkit, or `pip install nvidia-cuda-nvrtc-cu12`). Where there are, cuBLAS gives the ceiling of
# matrix products, compute-sanitizer checks the tests of single ops, and torch with transformers is measured as a peer.
# SETU_PROFILE=dev builds with the dev profile in place of release. SETU_TEST_PARTS chooses from: tests parity sanitizer
# bench start peer.
set -uo pipefail
cd "$(dirname "$0")/.."

parts=" ${SETU_TEST_PARTS:-tests parity sanitizer bench start peer} "
profile=${SETU_PROFILE:-release}
folder=$(mktemp -d)
mode=build
case "${1:-}" in
  "") ;;
  --pack) mode=pack; folder=${2:?--pack needs a folder}; mkdir -p "$folder" ;;
  --from) mode=from; folder=$(cd "${2:?--from needs a folder}" && pwd) ;;
  --emulated) mode=emulated ;;
  *) sed -n '2,14p' "$0"; exit 2 ;;
esac
wants() { [[ $parts == *" $1 "* ]]; }
step() { printf '\n== %s\n' "$*"; }

# Builds the tests, the bench and the program, and copies them to the folder without their symbols.
build() {
  step "build ($profile)"
  # As the whole workspace has them, so that what is built already isn't built again with other features.
  local tests=(--test dense --test in_flight --test long_context --test repeated_weights --test conformance --test parity --bench gpu)
  {
    cargo build --workspace --bin setu --profile "$profile" --message-format=json-render-diagnostics &&
      cargo test --workspace --profile "$profile" --no-run "${tests[@]}" --message-format=json-render-diagnostics
  } >"$folder/build.json" || exit 1
  python3 - "$folder" <<'PYTHON' || exit 1
import json, shutil, subprocess, sys
folder = sys.argv[1]
wanted = {"setu": "setu-host", "parity": "/tests", "gpu": "/tests"}
wanted |= {name: "backend-cuda" for name in ("conformance", "in_flight", "long_context", "repeated_weights", "dense")}
for line in open(f"{folder}/build.json"):
    message = json.loads(line) if line.startswith("{") else {}
    name = message.get("target", {}).get("name")
    ours = name in wanted and wanted[name] in message.get("package_id", "")
    if message.get("executable") and ours:
        shutil.copy(message["executable"], f"{folder}/{name}")
        subprocess.run(["strip", f"{folder}/{name}"], check=False)
PYTHON
  rm -f "$folder/build.json"
}

[[ $mode == from ]] || build
if [[ $mode == pack ]]; then
  cp -r bench/models "$folder/"
  echo "packed: $(du -sh "$folder" | cut -f1) in $folder"
  exit 0
fi

models=(bench/models/llama-3.2-1b bench/models/llama-3.1-8b)
bench_flags=()
if [[ $mode == emulated ]]; then
  step "the emulated driver"
  cargo test --workspace --test memory --profile "$profile" || exit 1
  # The newest that isn't for the sanitizer.
  driver=$(ls -td "${CARGO_TARGET_DIR:-target}"/tmp/cuemu-*/libcuda.so | xargs grep -L __asan_init | head -1)
  LD_LIBRARY_PATH=$(cd "$(dirname "$driver")" && pwd):${LD_LIBRARY_PATH:-}
  export LD_LIBRARY_PATH
  models=(bench/models/tiny)
  bench_flags=(--small)
fi
# NVIDIA's Python packages bring cuBLAS along.
libraries=$(python3 -c 'import glob, sysconfig; print(":".join(glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/lib")))' 2>/dev/null)
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}:$libraries:/usr/local/cuda/lib64
export SETU_TEST_GPU=1 SETU_BACKEND__TYPE=cuda
export SETU_CACHE=${SETU_CACHE:-$folder/cache}

results=$folder/results
mkdir -p "$results"
failed=0
# Runs a part, keeps what it says, and takes note of how it went.
run() {
  local name=$1
  shift
  if "$@" >"$results/$name.out" 2>"$results/$name.err"; then
    echo "ok      $name"
    echo ok >"$results/$name.rc"
  else
    echo "FAILED  $name"
    tail -n 20 "$results/$name.out" "$results/$name.err"
    echo failed >"$results/$name.rc"
    failed=1
  fi
}

step "the machine"
run doctor "$folder/setu" doctor --json
command -v nvidia-smi >/dev/null && nvidia-smi -L

if wants tests; then
  step "tests on the device, against the plain reference"
  for name in dense in_flight long_context repeated_weights conformance; do
    [[ $mode == emulated && $name == conformance ]] && continue
    run "$name" "$folder/$name"
  done
fi
if wants parity && [[ $mode != emulated ]]; then
  step "logits of random checkpoints, against transformers'"
  run parity "$folder/parity" every_model_agrees_with_its_reference
fi
if wants sanitizer && command -v compute-sanitizer >/dev/null; then
  step "compute-sanitizer over the products"
  run sanitizer compute-sanitizer --error-exitcode 9 "$folder/dense"
fi
if wants start; then
  step "from start to the first token, with kernels to compile and without"
  start() {
    SETU_CACHE=$folder/cold "$folder/setu" run --model "${models[-1]}" --model.load_format dummy \
      --model.max_model_len 128 --raw --timings --max-tokens 1 "a"
  }
  run start_cold start
  run start_warm start
fi
if wants bench; then
  step "speed beside the ceilings"
  run bench "$folder/gpu" "${bench_flags[@]}" "${models[@]}"
  # Many sessions with long contexts, whose K and V are most of what a step reads.
  eight_bits=(--kv=F8_E4M3 --formats=BF16 --requests=0)
  [[ $mode == emulated ]] || eight_bits+=(--contexts=4096 --batches=32,128 --prompts=8192)
  run bench_eight_bits "$folder/gpu" "${bench_flags[@]}" "${eight_bits[@]}" "${models[-1]}"
fi
if wants peer && [[ $mode != emulated ]] && python3 -c 'import torch, transformers' 2>/dev/null; then
  step "transformers with a static cache and compiled, on the same shapes"
  run peer python3 bench/peer.py "${models[@]}"
fi

step "results"
mkdir -p bench/results
python3 - "$results" "$mode" <<'PYTHON'
import datetime, glob, json, os, sys
folder, mode = sys.argv[1:]
read = lambda name: open(os.path.join(folder, name)).read()
def parsed(name):
    try:
        return json.loads(read(name).strip().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return None
def seconds(name, line):
    try:
        return next(float(row.split()[0]) / 1e3 for row in read(name).splitlines() if line in row)
    except (OSError, StopIteration, ValueError):
        return None
def machine(doctor):
    """What the machine has, without where it has it: results are for others to read."""
    found = [finding for finding in (doctor or {}).get("findings", []) if finding["part"] in ("backends", "libraries")]
    return {finding["what"]: ", ".join(word for word in finding["text"].split(", ") if "/" not in word) for finding in found}
report = {
    "date": datetime.date.today().isoformat(),
    "emulated": mode == "emulated",
    "machine": machine(parsed("doctor.out")),
    "parts": {os.path.basename(path)[:-3]: open(path).read().strip() for path in sorted(glob.glob(f"{folder}/*.rc"))},
    "bench": parsed("bench.out"),
    "peer": parsed("peer.out"),
    "start_to_first_token_s": {
        kind: seconds(f"start_{kind}.err", "process start") or seconds(f"start_{kind}.out", "process start")
        for kind in ("cold", "warm")
    },
}
if report["bench"]:
    report["bench"]["models"] += (parsed("bench_eight_bits.out") or {}).get("models", [])
device = (report["bench"] or {}).get("device") or "unknown device"
name = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
place = os.path.join(folder if mode == "emulated" else "bench/results", f"{report['date']}-{name}.json")
json.dump(report, open(place, "w"), indent=1)
print(place)
for model in (report["bench"] or {}).get("models", []):
    for kind, key in (("decode", "batch"), ("prefill", "tokens")):
        for row in model["figures"].get(kind, []):
            if "error" in row:
                continue
            context = f" context {row['context']}" if "context" in row else ""
            print(f"{model['model']} {model['weights']}, K and V {model['kv']}: {kind} {key} {row[key]}{context}:"
                  f" {row['tokens_per_s']:.0f} tokens/s, {100 * row['share_of_floor']:.0f} % of the ceiling")
PYTHON
exit $failed
