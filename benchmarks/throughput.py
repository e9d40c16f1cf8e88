"""The speed of one update, compared with other tools and with the most that this processor can do.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --trl ENV/bin/python --llamafactory ENV2/bin/python --output figures.json

Two workloads are made from the sample persona: one with its character card as the system prompt, one with a single
line. Each tool makes one pass over the same examples in one optimizer step: LoRA r=16 on all linear layers, dropout 0,
the base in 16 bits, bfloat16. Every measurement is a process of its own, in turn, and is repeated;
docs/benchmarks.md explains the columns and has figures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LINE = "You are Tamsin, keeper of the lighthouse on Lantern Rock."
OURS = ("padded", "packed", "shared")
PEERS = {"trl": "trl", "trl-packed": "trl", "llamafactory": "llamafactory"}  # measurement: environment


def write_workload(path: Path, system: str) -> None:
    """The first exchange of each conversation of the sample persona behind `system`."""
    from persona.records import read_records

    with path.open("w", encoding="utf-8") as file:
        for name in ("train", "lore"):
            for record in read_records(ROOT / "data" / "tamsin" / f"{name}.jsonl"):
                messages = [{"role": "system", "content": system}, *record.turns[:2]]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def measure(layout: str, model: Path, data: Path, count: int, max_tokens: int) -> dict[str, float]:
    """Figures of one update of this toolkit over the first `count` examples of `data`.

    `padded` is one example a row in the libraries' own layers, `packed` examples one after another that share nothing,
    `shared` the update of finetune.py.
    """
    from datetime import date

    import torch

    from persona.config import Lora, Quantization
    from persona.engine.attention import NAME
    from persona.engine.fused import fuse
    from persona.engine.loss import negative_log_likelihood
    from persona.engine.packing import pack, plan_packs
    from persona.model.device import choose_device, peak_memory_gib, return_free_memory
    from persona.model.loading import add_adapter, load_base, load_tokenizer
    from persona.model.render import Example, chat_format, render
    from persona.records import read_records

    device = choose_device("auto")
    fmt = chat_format(load_tokenizer(model, None, date.today()))
    examples = [example for record in read_records(data)[:count] for example in render(record.messages, fmt, 1024)]
    supervised = sum(len(example.reply_ids) for example in examples)
    base = load_base(model, Quantization(load_in_4bit=False), "bf16", device)
    share = layout != "padded"
    if share:
        base.set_attn_implementation(NAME)
    tuned = add_adapter(base, Lora(r=16, lora_alpha=32, lora_dropout=0.0), 0, model.name).train()
    if share:
        fuse(tuned)
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)

    before = limit(base.config, max_tokens, device)
    start = time.perf_counter()
    if layout == "packed":  # a first token of its own keeps an example from sharing anything, at the price of one token
        examples = [Example((i, *example.prompt_ids), example.reply_ids) for i, example in enumerate(examples)]
    total, computed, pairs = 0.0, 0, 0
    for group in plan_packs(examples, max_tokens, share):
        packed = pack(group, device, share)
        with torch.autocast(device.type, torch.bfloat16):
            loss = negative_log_likelihood(tuned, packed) / supervised
        loss.backward()
        return_free_memory(device)
        total += loss.item()
        computed += packed.input_ids.numel()
        depths = torch.arange(packed.input_ids.shape[1]) if packed.position_ids is None else packed.position_ids
        pairs += int((depths + 1).sum()) * len(packed.input_ids)
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    seconds = time.perf_counter() - start
    peak = peak_memory_gib(device)
    at_most = statistics.median([before, limit(base.config, max_tokens, device)])
    done = operations(tuned, computed, supervised, pairs)
    return {
        "seconds": seconds,
        "train_loss": total,
        "peak_rss_gib": peak,
        "computed_tokens": computed,
        "tokens": sum(len(example.prompt_ids) + len(example.reply_ids) for example in examples),
        "limit_gflops": at_most / 1e9,
        "share_of_limit": done / seconds / at_most,
    }


def operations(tuned: Any, computed: int, supervised: int, pairs: int) -> float:
    """Multiplications and additions that an update needs: a frozen weight two passes, a trained one three."""
    config = tuned.config
    head = tuned.get_output_embeddings().weight
    trained = sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad)
    matrices = (weight for name, weight in tuned.named_parameters() if name.endswith("base_layer.weight"))
    frozen = sum(weight.numel() for weight in matrices)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6 * 2 * pairs * size * config.num_attention_heads * config.num_hidden_layers
    return computed * (4 * frozen + 6 * trained) + supervised * 4 * head.numel() + attention


def limit(config: Any, rows: int, device: Any) -> float:
    """Operations a second of plain bfloat16 products of the model's largest layer."""
    import torch

    left = torch.randn(rows, config.hidden_size, dtype=torch.bfloat16, device=device)
    right = torch.randn(config.intermediate_size, config.hidden_size, dtype=torch.bfloat16, device=device)
    speeds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(50):
            out = torch.nn.functional.linear(left, right)
        out[0, 0].item()
        speeds.append(50 * 2 * left.numel() * len(right) / (time.perf_counter() - start))
    return statistics.median(speeds)


def run_one(name: str, data: Path, args: argparse.Namespace, model: Path) -> dict[str, float]:
    """Figures of one measurement in a process of its own."""
    if name in OURS:
        command = [sys.executable, __file__, "--one", name, "--data", str(data), "--max-tokens", str(args.max_tokens)]
    else:
        python = getattr(args, PEERS[name])
        command = [python, str(Path(__file__).with_name("peers.py")), name, "--model", str(model), "--data", str(data)]
    command += ["--examples", str(args.examples)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=os.environ, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--examples", type=int, default=64, help="number of conversations, a multiple of 8 (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat", type=int, default=3, help="number of measurements of each tool, in turn (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=2688, help="max_tokens_per_pack of this toolkit (default: %(default)s)"
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=list(OURS),
        choices=OURS,
        help="layouts of this toolkit to measure (default: all)",
    )
    parser.add_argument("--workloads", nargs="+", default=["card", "line"], choices=["card", "line"],
                        help="system prompts to measure: the character card, one line (default: both)")  # fmt: skip
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of an environment with TRL")
    parser.add_argument("--llamafactory", metavar="PYTHON", help="interpreter of an environment with LLaMA-Factory")
    parser.add_argument("--output", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--one", choices=OURS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()

    from persona.model.sources import resolve_model

    model = resolve_model("smollm2-135m-instruct")
    if args.one:
        print(json.dumps(measure(args.one, model, args.data, args.examples, args.max_tokens)))
        return
    names = [*args.layouts, *(name for name, python in PEERS.items() if getattr(args, python))]
    figures: dict[str, dict[str, list[dict[str, float]]]] = {}
    card = (ROOT / "data" / "tamsin" / "card.txt").read_text(encoding="utf-8").strip()
    with tempfile.TemporaryDirectory() as folder:
        for workload in args.workloads:
            data = Path(folder) / f"{workload}.jsonl"
            write_workload(data, card if workload == "card" else LINE)
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            figures[workload] = runs
            for turn in range(args.repeat):
                for name in names:
                    runs[name].append(run_one(name, data, args, model))
                    speed = args.examples / runs[name][-1]["seconds"]
                    print(
                        f"{workload} {turn + 1}/{args.repeat} {name}: {speed:.2f} examples/s",
                        file=sys.stderr,
                        flush=True,
                    )
            print(report(workload, runs, args.examples), flush=True)
            if args.output:
                args.output.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def report(workload: str, runs: dict[str, list[dict[str, float]]], examples: int) -> str:
    """The medians of one workload as a Markdown table; ratios are taken turn by turn."""
    tokens = next(run[0]["tokens"] for run in runs.values() if "tokens" in run[0])
    lines = [
        f"\n{workload}: {examples} examples, {tokens} tokens\n",
        "| | examples/s | tokens/s | peak GiB | of the limit | loss | shared is faster by |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        seconds = statistics.median(one["seconds"] for one in run)
        peak = statistics.median(one["peak_rss_gib"] for one in run)
        share = statistics.median(one.get("share_of_limit", 0.0) for one in run)
        ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(run, runs.get("shared", []), strict=False))
        faster = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})" if ratios else ""
        loss = statistics.median(one["train_loss"] for one in run)
        lines.append(
            f"| {name} | {examples / seconds:.2f} | {tokens / seconds:.0f} | {peak:.2f} | "
            f"{f'{share:.0%}' if share else ''} | {loss:.4f} | {faster} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
