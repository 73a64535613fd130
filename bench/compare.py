"""Setu beside other engines on the same model files, side by side and in turns: a JSON file, and Markdown to stdout.

    python3 bench/compare.py --setu target/release/setu --llama-bench PATH --llama-batched-bench PATH \\
        --llama-server PATH --model FILE.gguf --rounds 5 --threads 2 --json OUT

Quote the ratios: absolute figures drift with the machine. Each is the median over rounds of Setu's figure over the
peer's in the same round (of the peer's over Setu's where less is better), so that more than 1 says that Setu is ahead.
A peer whose program isn't given is left out; one that fails on a line is told with the reason.
"""

import argparse
import http.client
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BATCHES = [1, 8, 32]
LONG = 8064
# Line → title, unit, whether more is better. Lines of a group are measured together.
GROUPS = {
    "prefill": {"prefill": ("prefill of 512 tokens", "tokens/s", True)},
    "decode": {"decode": ("decode of 128 tokens", "tokens/s", True)},
    "long": {"long": (f"decode of 32 tokens at {LONG}", "tokens/s", True)},
    "batch": {f"batch{n}": (f"decode in a batch of {n}", "tokens/s", True) for n in BATCHES},
    "serve": {
        "serve": ("32 streams", "tokens/s", True),
        "serve_ttft": ("32 streams: first token", "ms", False),
        "serve_itl": ("32 streams: between tokens", "ms", False),
    },
    "start": {"start": ("process start to first token", "s", False)},
}


class Fails(Exception):
    """A measurement that came to nothing, and why."""


class Skipped(Exception):
    """A measurement that nobody asked for, and what would ask for it."""


def checked(command, timeout, env=None):
    """What a program prints, or why it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise Fails(f"no end within {timeout} s") from None
    except OSError as error:
        raise Fails(f"{Path(command[0]).name} can't be started: {error.strerror}") from None
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise Fails(f"exit status {done.returncode}: {lines[-1] if lines else 'nothing was said'}")
    return done.stdout


class Server:
    """A server process, from its start until the block ends."""

    def __init__(self, command, port, env=None):
        self.command, self.port, self.env = command, port, env

    def __enter__(self):
        self.started = time.perf_counter()
        try:
            self.process = subprocess.Popen(
                self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **(self.env or {})}
            )
        except OSError as error:
            raise Fails(f"{Path(self.command[0]).name} can't be started: {error.strerror}") from None
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def until(self, answers, timeout):
        """Tries `answers` until it gives something."""
        while time.perf_counter() - self.started < timeout:
            if self.process.poll() is not None:
                raise Fails(f"the server ended with status {self.process.returncode}")
            try:
                found = answers(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout))
                if found is not None:
                    return found
            except (OSError, http.client.HTTPException, ValueError):
                pass
            time.sleep(0.005)
        raise Fails(f"the server gave no answer within {timeout} s")

    def model(self, timeout):
        """The name by which it serves its model."""

        def ask(connection):
            connection.request("GET", "/v1/models")
            answer = connection.getresponse()
            return json.load(answer)["data"][0]["id"] if answer.status == 200 else None

        return self.until(ask, timeout)

    def first_token_s(self, timeout):
        """Seconds from the process's start to the first token that it streams."""
        body = {"prompt": "The sky is", "max_tokens": 4, "stream": True, "temperature": 0}

        def ask(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status == 503:
                return None
            if answer.status != 200:
                raise Fails(f"HTTP {answer.status}: {answer.read(200).decode(errors='replace')}")
            for line in answer:
                data = line.removeprefix(b"data:").strip()
                choices = json.loads(data).get("choices") if data.startswith(b"{") else None
                if choices and choices[0].get("text"):
                    return time.perf_counter() - self.started
            raise Fails("the answer has no token")

        return self.until(ask, timeout)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Engine:
    """What is measured: `measure` gives a group's figures by line."""

    def __init__(self, args):
        self.args, self.threads = args, str(args.threads)

    def measure(self, group, model):
        return getattr(self, group)(model)

    def load(self, command, port, extra=None):
        """The load generator's figures of the server that `command` starts."""
        args = self.args
        if not args.client or not args.client_prompts:
            raise Skipped("--client and --client-prompts were not given")
        with Server(command, port) as server:
            name = server.model(args.timeout)
            client = [args.client_python, args.client, "--url", f"http://127.0.0.1:{port}", "--model", name]
            client += ["--prompts", args.client_prompts, "--max-tokens", "64", "--concurrency", "32", "--repeat", "1"]
            client += ["--extra", json.dumps({"ignore_eos": True, **(extra or {})})]
            level = json.loads(checked(client, args.timeout))["levels"][0]
        if level["errors"]:
            raise Fails(f"{level['errors']} requests fail: {level['runs'][0].get('error_sample')}")
        run = level["runs"][0]
        return {"serve": run["output_tok_per_s"], "serve_ttft": run["ttft_ms_p50"], "serve_itl": run["itl_ms_mean"]}


class Setu(Engine):
    name = "setu"

    def version(self):
        return checked([self.args.setu, "--version"], 60).strip()

    def bench(self, model, part, *flags):
        command = [self.args.setu, "bench", model, "--backend", "cpu", "--backend.threads", self.threads, "--rounds", "1"]
        report = json.loads(checked([*command, "--json", "--only", part, *flags], self.args.timeout))
        rows = report["measurements"]
        for row in rows:
            if "error" in row:
                raise Fails(row["error"])
        return [row["tokens_per_s"]["median"] for row in rows]

    def prefill(self, model):
        return {"prefill": self.bench(model, "prefill", "--prompts", "512")[0]}

    def decode(self, model):
        return {"decode": self.bench(model, "decode", "--generate", "128", "--contexts", "0")[0]}

    def long(self, model):
        return {"long": self.bench(model, "decode", "--generate", "32", "--contexts", str(LONG))[0]}

    def batch(self, model):
        rates = self.bench(model, "batch", "--batches", ",".join(map(str, BATCHES)))
        return {f"batch{n}": rate for n, rate in zip(BATCHES, rates)}

    def server(self, model):
        port = free_port()
        flags = ["--backend", "cpu", "--backend.threads", self.threads, "--server.port", str(port)]
        return [self.args.setu, "serve", model, *flags, "--kv.prefix_cache=false"], port

    def serve(self, model):
        return self.load(*self.server(model))

    def start(self, model):
        command, port = self.server(model)
        with Server(command, port) as server:
            return {"start": server.first_token_s(self.args.timeout)}


class LlamaCpp(Engine):
    name = "llama.cpp"

    build = "not told"

    def version(self):
        return self.build

    def bench(self, model, *flags):
        command = [self.args.llama_bench, "-m", model, "-t", self.threads, "-r", "1", "-o", "json", *flags]
        rows = json.loads(checked(command, self.args.timeout))
        if not rows:
            raise Fails("llama-bench measured nothing")
        self.build = f"b{rows[-1].get('build_number')} {rows[-1].get('build_commit')}"
        return rows[-1]["avg_ts"]

    def prefill(self, model):
        return {"prefill": self.bench(model, "-p", "512", "-n", "0")}

    def decode(self, model):
        return {"decode": self.bench(model, "-p", "0", "-n", "128")}

    def long(self, model):
        return {"long": self.bench(model, "-p", "0", "-n", "32", "-d", str(LONG))}

    def batch(self, model):
        if not self.args.llama_batched_bench:
            raise Skipped("--llama-batched-bench was not given")
        command = [self.args.llama_batched_bench, "-m", model, "-t", self.threads, "-c", "8192", "-npp", "128"]
        command += ["-ntg", "32", "-npl", ",".join(map(str, BATCHES)), "--output-format", "jsonl"]
        text = checked(command, self.args.timeout)
        rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        rates = {row["pl"]: row["speed_tg"] for row in rows}
        if missing := [n for n in BATCHES if n not in rates]:
            raise Fails(f"llama-batched-bench printed no row of {missing} sessions")
        return {f"batch{n}": rates[n] for n in BATCHES}

    def server(self, model, slots):
        if not self.args.llama_server:
            raise Skipped("--llama-server was not given")
        port = free_port()
        flags = ["-t", self.threads, "-np", str(slots), "-c", "8192", "--no-webui", "--cache-ram", "0", "--port", str(port)]
        return [self.args.llama_server, "-m", model, *flags], port

    def serve(self, model):
        return self.load(*self.server(model, 32), {"cache_prompt": False})

    def start(self, model):
        command, port = self.server(model, 1)
        with Server(command, port) as server:
            return {"start": server.first_token_s(self.args.timeout)}


class PythonPeer(Engine):
    """A peer with a Python API: a script of its own measures all rounds in one process, which takes long to start."""

    groups = ("prefill", "decode")

    def __init__(self, args, name, python, script, model=None):
        super().__init__(args)
        self.name, self.python, self.script, self.other_model = name, python, script, model
        self.found, self.package = {}, "not told"

    def version(self):
        return self.package

    def measure(self, group, model):
        if group not in self.groups:
            raise Skipped("not measured with this peer")
        if model not in self.found:
            command = [self.python, str(HERE / self.script), self.other_model or model, str(self.args.rounds)]
            threads = {name: self.threads for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")}
            try:
                lines = checked(command, self.args.timeout, threads).strip().splitlines()
                self.found[model] = json.loads(lines[-1] if lines else "")
                self.package = self.found[model]["version"]
            except ValueError:
                self.found[model] = {"error": "it printed no figures"}
            except Fails as error:
                self.found[model] = {"error": str(error)}
        found = self.found[model]
        if "error" in found:
            raise Fails(found["error"])
        if not found[group]:
            raise Fails("it gave fewer figures than rounds")
        return {group: found[group].pop(0)}


def without_paths(text):
    """`text` with the names alone of the files that it names."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:'\"`]+/)+", "", str(text))


def measure(args, engines, model, results):
    """Adds the figures of all rounds to `results`, and why there are none."""
    for number in range(args.rounds):
        for group in args.only:
            # Whoever comes first finds the machine as the other left it, so they take turns.
            for engine in engines if number % 2 == 0 else engines[::-1]:
                lines = GROUPS[group]
                entries = [results[line][engine.name] for line in lines]
                if any("fails" in entry or "skipped" in entry for entry in entries):
                    continue
                try:
                    figures = engine.measure(group, model)
                except Skipped as error:
                    for entry in entries:
                        entry["skipped"] = str(error)
                    continue
                except (Fails, ValueError, KeyError, IndexError) as error:
                    reason = str(error) if isinstance(error, Fails) else f"{type(error).__name__}: {error}"
                    for entry in entries:
                        entry["fails"] = without_paths(reason)
                    continue
                for line, entry in zip(lines, entries):
                    entry["rounds"].append(figures[line])
                print(f"{Path(model).name}, round {number + 1}: {group} of {engine.name}", file=sys.stderr)


def summarize(results):
    """Adds medians, and ratios of the rounds in which both were measured."""
    for line, of in results.items():
        more = next(group[line][2] for group in GROUPS.values() if line in group)
        for name, entry in of.items():
            if entry["rounds"]:
                entry["median"] = statistics.median(entry["rounds"])
            pairs = list(zip(of["setu"]["rounds"], entry["rounds"]))
            if name != "setu" and pairs:
                ratios = [(ours / theirs if more else theirs / ours) for ours, theirs in pairs]
                entry["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def compare(args):
    engines = [Setu(args), LlamaCpp(args)] if args.llama_bench else [Setu(args)]
    if args.mistralrs:
        engines.append(PythonPeer(args, "mistral.rs", args.mistralrs, "peer_mistralrs.py"))
    if args.vllm:
        engines.append(PythonPeer(args, "vLLM", args.vllm, "peer_vllm.py", args.vllm_model))
    models, stopped = [], False
    for model in args.model:
        results = {line: {engine.name: {"rounds": []} for engine in engines} for group in args.only for line in GROUPS[group]}
        try:
            measure(args, engines, model, results)
        except KeyboardInterrupt:
            stopped = True
            print("stopped: what was measured so far follows", file=sys.stderr)
        summarize(results)
        models.append({"model": Path(model).name, "bytes": Path(model).stat().st_size, "lines": results})
        if stopped:
            break
    versions = {}
    for engine in engines:
        try:
            versions[engine.name] = engine.version()
        except Fails as error:
            versions[engine.name] = f"unknown: {without_paths(error)}"
    flags = {name: without_paths(value) if isinstance(value, str) else value for name, value in vars(args).items()}
    flags["model"] = [Path(model).name for model in args.model]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
        "flags": flags,
        "models": models,
    }


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def markdown(report):
    versions = "; ".join(f"{name}: {version}" for name, version in report["versions"].items())
    text = [f"{report['cpu']}, {report['flags']['threads']} threads, medians of {report['flags']['rounds']} rounds. {versions}.", ""]
    notes = []
    for model in report["models"]:
        peers = [name for name in report["versions"] if name != "setu"]
        head = [model["model"], "unit", "setu", *(cell for peer in peers for cell in (peer, "ratio"))]
        text += ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
        for group in GROUPS.values():
            for line, (title, unit, _) in group.items():
                if line not in model["lines"]:
                    continue
                cells = [title, unit]
                for name in ["setu", *peers]:
                    entry = model["lines"][line][name]
                    cells.append(f"{entry['median']:.4g}" if "median" in entry else "fails" if "fails" in entry else "–")
                    if name != "setu":
                        ratio = entry.get("ratio")
                        cells.append(f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "–")
                    for kind in ("fails", "skipped"):
                        if kind in entry:
                            notes.append(f"- {model['model']}, {title}, {name} {kind}: {entry[kind]}")
                text.append("| " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text + notes)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setu", required=True, metavar="PATH")
    parser.add_argument("--llama-bench", metavar="PATH")
    parser.add_argument("--llama-batched-bench", metavar="PATH")
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument("--mistralrs", metavar="PYTHON", help="a python that has the package mistralrs")
    parser.add_argument("--vllm", metavar="PYTHON", help="a python that has the package vllm")
    parser.add_argument("--vllm-model", metavar="PATH", help="what vLLM loads in place of the model, such as its folder")
    parser.add_argument("--client", metavar="PATH", help="a closed-loop load generator")
    parser.add_argument("--client-prompts", metavar="FILE", help="its prompts, none of which share a prefix")
    parser.add_argument("--client-python", metavar="PYTHON", default=sys.executable, help="what runs it [this python]")
    parser.add_argument("--model", action="append", required=True, metavar="FILE", help="may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800, metavar="S", help="for one measurement [1800]")
    parser.add_argument("--only", default=",".join(GROUPS), help=f"of {','.join(GROUPS)} [all]")
    parser.add_argument("--json", metavar="OUT", help="where all figures go")
    args = parser.parse_args()
    args.only = [group for group in args.only.split(",") if group]
    if unknown := [group for group in args.only if group not in GROUPS]:
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if missing := [model for model in args.model if not Path(model).is_file()]:
        parser.error(f"--model: there is no file {', '.join(missing)}")
    return args


def main():
    args = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = compare(args)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))


if __name__ == "__main__":
    main()
