#!/usr/bin/env python3
"""Puts `setu serve` under load on loopback and checks that it stays in order.

    cargo build --release -p setu-host --bin setu
    pip install aiohttp
    python3 tests/load/load.py --setu target/release/setu                 # the levels: a few minutes
    python3 tests/load/load.py --setu target/release/setu --minutes 30    # the levels, then half an hour of steady load

Starts a server, and at each level of --streams has that many clients ask for one streamed answer after another, from
/v1/chat/completions and /v1/completions in turn. Of the requests --cancel are left at random: before anything came or in
the middle of the answer. The steady load is the same with --steady-streams clients. What is checked:

  answers   whoever stays gets the whole answer: its end, the usage, and as many tokens as were asked for
  counts    the server counts as many answers that ended well as clients saw, and no failed or rejected ones
  pages     after each level no session is left and no KV page is in use (pages that the prefix cache keeps aren't)
  memory    resident memory under the steady load, once it has warmed up, doesn't rise: the last quarter's median is
            less than 2 % or 8 MiB over that of the second quarter
  health    a process of its own asks for /health every 100 ms, on a new connection each time; p99 is under 50 ms at
            each level and under the steady load. It is timed from when it was due, if the answer before was late.

Prints a line for each level and writes all figures as JSON to --json; exits with 1 when a check fails.
What stands behind `--` goes to the server, such as `-- --engine.max_sessions 512`. Prompts have random parts, so the
prefix cache fills until --kv-memory is used up: memory can only be flat from then on.
"""

import argparse
import asyncio
import http.client
import json
import math
import os
import random
import statistics
import subprocess
import sys
import threading
import time

WORDS = "time year people way day man thing woman life child world school state family".split()
PREFIX = "You are asked about words. Say something short about these: "
PROBE_S = 0.1
MOST_HEALTH_MS = 50.0


def arguments():
    own, server = sys.argv[1:], []
    if "--" in own:
        own, server = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setu", default="target/release/setu", help="the program")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32, 128, 512])
    parser.add_argument("--seconds", type=float, default=20, help="how long a level goes on at least")
    parser.add_argument("--minutes", type=float, default=0, help="how long the steady load goes on")
    parser.add_argument("--steady-streams", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--cancel", type=float, default=0.1, help="part of the requests that clients leave")
    parser.add_argument("--kv-memory", default="512MiB")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args(own)
    args.server = server
    return args


def probe(address):
    """Asks for /health until killed, and tells when and how long it took."""
    due = time.monotonic()
    while True:
        time.sleep(max(0.0, due - time.monotonic()))
        # An answer that is late must not hide that those behind it would have been as well.
        began = due if time.monotonic() - due > PROBE_S else time.monotonic()
        status = "failed"
        try:
            connection = http.client.HTTPConnection(address, timeout=30)
            connection.request("GET", "/health")
            response = connection.getresponse()
            response.read()
            status = str(response.status)
            connection.close()
        except OSError as error:
            status = type(error).__name__
        print(began, time.monotonic() - began, status, flush=True)
        due += PROBE_S


class Prober:
    def __init__(self, address):
        command = [sys.executable, os.path.abspath(__file__), "--probe", address]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.seen = []
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            fields = line.split()
            # The last line may be cut off when the prober is ended.
            if len(fields) == 3 and line.endswith("\n"):
                self.seen.append((float(fields[0]), float(fields[1]) * 1e3, fields[2]))

    def between(self, start, end):
        """What health was like, in ms."""
        seen = [(took, status) for began, took, status in list(self.seen) if start <= began <= end]
        took = sorted(took for took, _ in seen)
        wrong = sum(status != "200" for _, status in seen)
        if not took:
            return {"count": 0, "not_200": 0, "p50_ms": None, "p99_ms": None, "max_ms": None}
        at = lambda part: round(took[min(len(took) - 1, int(len(took) * part))], 2)
        return {"count": len(took), "not_200": wrong, "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1)}


class Server:
    def __init__(self, args):
        command = [args.setu, "serve", args.model, "--server.port", "0", "--kv.memory", args.kv_memory]
        # Whoever waits long is to be served all the same.
        command += ["--scheduler.queue_timeout_s", "0", *args.server]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log = []
        self.address = None
        for line in self.process.stderr:
            self.log.append(line)
            if "http://" in line:
                self.address = line.split("http://")[1].strip()
                break
        if not self.address:
            sys.exit(f"{' '.join(command)} doesn't come up:\n{''.join(self.log)}")
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()

    def resident_mib(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            lines = dict(line.split(":", 1) for line in status)
        return int(lines["VmRSS"].split()[0]) / 1024

    def get(self, path):
        connection = http.client.HTTPConnection(self.address, timeout=60)
        connection.request("GET", path)
        body = connection.getresponse().read().decode()
        connection.close()
        return body

    def metrics(self):
        """The sum over all labels of each metric; failures by their reason."""
        sums = {}
        for line in self.get("/metrics").splitlines():
            if line.startswith("#") or " " not in line:
                continue
            series, value = line.rsplit(" ", 1)
            name, _, labels = series.partition("{")
            if name == "setu_request_failure_total":
                name += "_" + labels.split('reason="')[1].split('"')[0]
            sums[name] = sums.get(name, 0.0) + float(value)
        return sums


class Load:
    def __init__(self, args, server, session):
        self.args, self.server, self.session = args, server, session
        self.random = random.Random(args.seed)
        self.asked = 0

    async def level(self, streams, seconds):
        end = time.monotonic() + seconds
        results = []

        async def client():
            while True:
                results.append(await self.request())
                if time.monotonic() >= end:
                    return

        await asyncio.gather(*(client() for _ in range(streams)))
        return results

    async def request(self):
        """One answer: what became of it, its tokens and the time to the first."""
        rng, most = self.random, self.args.max_tokens
        self.asked += 1
        body = {"max_tokens": most, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        prompt = PREFIX + " ".join(rng.choices(WORDS, k=rng.randint(8, 40)))
        if self.asked % 2:
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": prompt}]
        else:
            path, body["prompt"] = "/v1/completions", prompt
        # Left at once, before the first token, or behind some.
        leave_behind = rng.choice([None, rng.randint(0, most - 2)]) if rng.random() < self.args.cancel else math.inf
        began, first, tokens, usage, finish, done = time.perf_counter(), None, 0, None, None, False
        try:
            if leave_behind is None:
                await asyncio.wait_for(self.leave_before_answer(path, body), rng.random() * 0.2)
                return "cancelled", 0, None
            async with self.session.post(f"http://{self.server.address}{path}", json=body) as response:
                if response.status != 200:
                    return f"HTTP {response.status}: {(await response.text())[:200]}", 0, None
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    if line.strip() == b"data: [DONE]":
                        done = True
                        break
                    event = json.loads(line[6:])
                    if "error" in event:
                        return f"error in the stream: {str(event['error'])[:200]}", tokens, first
                    usage = event.get("usage") or usage
                    for choice in event["choices"]:
                        finish = choice["finish_reason"] or finish
                        tokens += 1
                    first = first or time.perf_counter() - began
                    if tokens > leave_behind:
                        response.close()
                        return "cancelled", tokens, first
        except asyncio.TimeoutError:
            return ("cancelled" if leave_behind is None else "timed out"), tokens, first
        except Exception as error:
            return f"{type(error).__name__}: {error}", tokens, first
        if not done or finish != "length" or not usage or usage["completion_tokens"] != most:
            return f"incomplete: done {done}, finish_reason {finish}, usage {usage}", tokens, first
        return "whole", most, first

    async def leave_before_answer(self, path, body):
        async with self.session.post(f"http://{self.server.address}{path}", json=body) as response:
            await response.read()


def settle(server, seconds=10.0):
    """Waits until nothing is left of the sessions; what is left after that, and how long it took."""
    names = ["setu_num_requests_running", "setu_num_requests_waiting", "setu_requests_in_progress", "setu_kv_cache_usage_perc"]
    began = time.monotonic()
    while True:
        metrics = server.metrics()
        left = {name: metrics.get(name, 0.0) for name in names if metrics.get(name, 0.0) != 0.0}
        if not left or time.monotonic() - began > seconds:
            return left, time.monotonic() - began, metrics
        time.sleep(0.05)


async def measure(load, server, prober, name, streams, seconds, memory):
    before, start = server.metrics(), time.monotonic()
    results = await load.level(streams, seconds)
    end = time.monotonic()
    left, settled_s, after = settle(server)
    grown = lambda key: after.get(key, 0.0) - before.get(key, 0.0)
    whole = sum(what == "whole" for what, _, _ in results)
    cancelled = sum(what == "cancelled" for what, _, _ in results)
    wrong = [what for what, _, _ in results if what not in ("whole", "cancelled")]
    first = sorted(first for what, _, first in results if what == "whole")
    row = {
        "level": name, "streams": streams, "seconds": round(end - start, 1), "requests": len(results), "whole": whole,
        "cancelled": cancelled, "wrong": len(wrong), "wrong_samples": sorted(set(wrong))[:5],
        "tokens_per_s": round(sum(tokens for _, tokens, _ in results) / (end - start), 1),
        "ttft_p50_ms": round(statistics.median(first) * 1e3, 1) if first else None,
        "server_ended_well": grown("setu_request_success_total"),
        "server_aborted": grown("setu_request_failure_total_aborted"),
        "server_failed": grown("setu_request_failure_total_failed") + grown("setu_request_failure_total_rejected"),
        "settled_s": round(settled_s, 2), "left": left, "health": prober.between(start, end),
        "resident_mib": round(server.resident_mib(), 1),
    }
    failures = []
    if wrong:
        failures.append(f"{len(wrong)} answers went wrong, such as: {wrong[0]}")
    if row["server_failed"]:
        failures.append(f"the server failed or rejected {row['server_failed']:.0f} sessions")
    # One that is left may have ended well by then.
    if not whole <= row["server_ended_well"] <= whole + cancelled:
        failures.append(f"clients saw {whole} whole answers, the server counts {row['server_ended_well']:.0f}")
    if left:
        failures.append(f"10 s after the last answer there is still {left}")
    health = row["health"]
    if health["not_200"] or not health["count"] or health["p99_ms"] >= MOST_HEALTH_MS:
        failures.append(f"health was {health}")
    if memory is not None:
        row["memory"] = memory.verdict(start, end)
        if row["memory"]["rises"]:
            failures.append(f"resident memory rises: {row['memory']}")
    row["failures"] = failures
    return row


class Memory:
    """Resident memory, sampled every second."""

    def __init__(self, server):
        self.samples = []

        def sample():
            while server.process.poll() is None:
                try:
                    self.samples.append((time.monotonic(), server.resident_mib()))
                except (OSError, KeyError):
                    return
                time.sleep(1)

        threading.Thread(target=sample, daemon=True).start()

    def verdict(self, start, end):
        inside = [(at, mib) for at, mib in self.samples if start <= at <= end]
        quarter = lambda k: [mib for at, mib in inside if k <= (at - start) / (end - start) * 4 < k + 1]
        medians = [round(statistics.median(quarter(k)), 1) for k in range(4)]
        rise = medians[3] - medians[1]
        minutes = [round(mib, 1) for _, mib in inside[::60]]
        allowed = max(8.0, 0.02 * medians[1])
        return {"quarter_medians_mib": medians, "rise_mib": round(rise, 2), "rises": rise > allowed, "by_minute_mib": minutes,
                "lowest_mib": round(min(mib for _, mib in inside), 1), "highest_mib": round(max(mib for _, mib in inside), 1)}


def show(row):
    health = row["health"]
    print(f"{row['level']:>8} {row['streams']:>7} {row['requests']:>8} {row['whole']:>7} {row['cancelled']:>9} {row['wrong']:>5}"
          f" {row['tokens_per_s']:>8} {row['ttft_p50_ms'] or 0:>9} {row['settled_s']:>7} {health['p50_ms'] or 0:>8} {health['p99_ms'] or 0:>8}"
          f" {health['max_ms'] or 0:>8} {row['resident_mib']:>7}  {'; '.join(row['failures']) or 'ok'}", flush=True)


async def main(args):
    import aiohttp

    server = Server(args)
    prober = None
    try:
        prober, memory = Prober(server.address), Memory(server)
        rows = []
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=1800)) as session:
            load = Load(args, server, session)
            print("   level streams requests   whole cancelled wrong tokens/s ttft50_ms settled health50 health99 healthmx rss_mib")
            for streams in args.streams:
                rows.append(await measure(load, server, prober, "level", streams, args.seconds, None))
                show(rows[-1])
            if args.minutes:
                seconds = args.minutes * 60
                rows.append(await measure(load, server, prober, "steady", args.steady_streams, seconds, memory))
                show(rows[-1])
                print("resident memory:", json.dumps(rows[-1]["memory"]))
        if server.process.poll() is not None:
            rows.append({"level": "end", "failures": [f"the server ended: {''.join(server.log)[-2000:]}"]})
        figures = {"model": args.model, "server": args.server, "max_tokens": args.max_tokens, "cancel": args.cancel, "seed": args.seed, "levels": rows}
        if args.json:
            with open(args.json, "w") as file:
                json.dump(figures, file, indent=1)
        return any(row["failures"] for row in rows)
    finally:
        for process in [prober and prober.process, server.process]:
            if process:
                process.terminate()
                process.wait()
        said = "".join(line for line in server.log if " WARN " in line or " ERROR " in line or "panicked" in line)
        if said:
            print("the server said:\n" + said[-4000:], file=sys.stderr)


if __name__ == "__main__":
    args = arguments()
    if args.probe:
        probe(args.probe)
    sys.exit(asyncio.run(main(args)))
