"""A page and plots of what `scripts/gpu.sh` measured: `python3 bench/report.py bench/results/FILE.json`.

Writes docs/gpu.md and, where there is matplotlib, docs/images/gpu-decode.svg and gpu-prefill.svg.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def table(head, rows):
    line = lambda cells: "| " + " | ".join(str(cell) for cell in cells) + " |"
    return [line(head), line(["---"] + ["---:"] * (len(head) - 1)), *map(line, rows), ""]


def measured(rows):
    return [row for row in rows if "error" not in row]


def title(model):
    kv = model.get("kv", "BF16")
    return f"{model['model']}, {model['weights']}" + (f", K and V in {kv}" if kv != "BF16" else "")


def page(report, name):
    bench, lines = report["bench"], []
    rate = bench["matmul_bf16_operations_per_s"]
    lines += [
        "# On a GPU",
        "",
        f"What `scripts/gpu.sh` measured on one {bench['device']} ({report['date']}, [all figures](../bench/results/{name})),",
        "with random weights of the models' shapes. *Of the ceiling* is the least time that the work can take, by the bytes",
        "of weights, keys and values that a step reads or by its operations, over the time that it took. The ceilings were",
        f"measured in the same run: copies on the device move {bench['copy_bytes_per_s'] / 1e12:.2f} TB/s, and cuBLAS multiplies"
        + (f" at {rate / 1e12:.0f} TFLOP/s in bfloat16." if rate else " not at all: it was not found."),
        "",
        "![Decoding](images/gpu-decode.svg)",
        "![Prompts](images/gpu-prefill.svg)",
        "",
    ]
    failed = [f"`{name}`" for name, how in report["parts"].items() if how == "failed"]
    if failed:
        lines += [f"Failed in that run: {', '.join(failed)}.", ""]
    peers = {peer["model"]: peer for peer in (report.get("peer") or {}).get("models", []) if "error" not in peer}
    for model in bench["models"]:
        lines += [f"## {title(model)}", ""]
        figures = model["figures"]
        if "error" in figures:
            lines += [f"Not measured: {figures['error']}", ""]
            continue
        peer = peers.get(model["model"], {}) if title(model) == f"{model['model']}, BF16" else {}
        decode = {(row["batch"], row["context"]): row["tokens_per_s"] for row in peer.get("decode", [])}
        prefill = {row["tokens"]: row["tokens_per_s"] for row in peer.get("prefill", [])}
        over = lambda own, other: f"{own / other:.2f} ×" if other else "–"
        head = ["decoding: sessions", "context", "tokens/s", "ms a step", "of the ceiling"]
        rows = [
            [row["batch"], row["context"], f"{row['tokens_per_s']:.0f}", f"{1e3 * row['step_s']:.2f}"]
            + [f"{100 * row['share_of_floor']:.0f} %"]
            + ([over(row["tokens_per_s"], decode.get((row["batch"], row["context"])))] if peer else [])
            for row in measured(figures["decode"])
        ]
        lines += table(head + (["over transformers"] if peer else []), rows)
        head = ["prompt: tokens", "tokens/s", "TFLOP/s", "of the ceiling"]
        rows = [
            [row["tokens"], f"{row['tokens_per_s']:.0f}", f"{row['operations_per_s'] / 1e12:.0f}"]
            + [f"{100 * row['share_of_floor']:.0f} %"]
            + ([over(row["tokens_per_s"], prefill.get(row["tokens"]))] if peer else [])
            for row in measured(figures["prefill"])
        ]
        lines += table(head + (["over transformers"] if peer else []), rows)
        trace = model.get("trace")
        if trace and "error" not in trace:
            ms = lambda times, at: f"{1e3 * times[at]:.1f}"
            head = [f"engine: {trace['requests']} requests, {trace['requests_per_s']:.0f} a second", "p50 ms", "p90 ms", "p99 ms"]
            names = [("time to the first token", "ttft_s"), ("between tokens", "itl_s")]
            lines += table(head, [[label] + [ms(trace[key], at) for at in ("p50", "p90", "p99")] for label, key in names])
            lines += [
                f"{trace['tokens_per_s']:.0f} tokens/s; {100 * trace['good_share']:.0f} % of the requests with their first token"
                f" within {1e3 * trace['good_ttft_s']:.0f} ms and {1e3 * trace['good_itl_s']:.0f} ms a token: goodput"
                f" {trace['goodput_tokens_per_s']:.0f} tokens/s.",
                "",
            ]
    start = report["start_to_first_token_s"]
    if all(start.values()):
        lines += [
            f"From process start to the first token: {start['cold']:.1f} s with all kernels to compile, {start['warm']:.1f} s"
            " with them on disk.",
            "",
        ]
    return "\n".join(lines)


def plots(report, folder):
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "setu"
    from matplotlib import pyplot

    for kind, x, label in (("decode", "batch", "sessions that decode"), ("prefill", "tokens", "tokens of the prompt")):
        figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
        for model in report["bench"]["models"]:
            rows = measured(model["figures"].get(kind, []))
            for context in sorted({row.get("context") for row in rows}, key=lambda context: context or 0):
                of_context = [row for row in rows if row.get("context") == context]
                name = title(model) + (f", context {context}" if context else "")
                axes.plot([row[x] for row in of_context], [100 * row["share_of_floor"] for row in of_context], "o-", label=name)
        axes.set(xscale="log", ylim=(0, 100), xlabel=label, ylabel="% of the ceiling")
        ticks = sorted({row[x] for model in report["bench"]["models"] for row in measured(model["figures"].get(kind, []))})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        figure.savefig(folder / f"gpu-{kind}.svg", metadata={"Date": None})
        pyplot.close(figure)


def main():
    path = Path(sys.argv[1])
    report = json.loads(path.read_text())
    folder = ROOT / "docs" / "images"
    folder.mkdir(exist_ok=True)
    (ROOT / "docs" / "gpu.md").write_text(page(report, path.name))
    plots(report, folder)


if __name__ == "__main__":
    main()
