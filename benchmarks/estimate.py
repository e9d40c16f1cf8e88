"""The estimates of finetune.py --dry-run beside what real runs take: memory and time, for models of three sizes.

    python benchmarks/estimate.py
    python benchmarks/estimate.py --sizes tiny 0.5B --turns 3 --output figures.json

Each run is the command of a user, in a process of its own: first --dry-run, which measures two updates, then the
training of one epoch on a part of the sample persona, without evaluations. The models of 0.5B weights and the tiny
one are random, in the shape of Qwen2.5-0.5B and of a Llama with two layers, with the embedded model's tokenizer.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# size: conversations, epochs; so many that the packs differ, and no run takes more than some minutes
RUNS = {"tiny": (48, 1), "135M": (64, 1), "0.5B": (24, 1)}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152,
    },
    "0.5B": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
}  # fmt: skip


def random_model(size: str, folder: Path) -> Path:
    """A folder with a random model of the shape `size` and the embedded model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from persona.model.sources import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m-instruct"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES[size], eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def training_file(count: int, folder: Path) -> Path:
    """The first `count` conversations of the sample persona."""
    path = folder / f"{count}.jsonl"
    lines = (ROOT / "data" / "tamsin" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:count]), encoding="utf-8")
    return path


def seconds(text: str) -> float:
    """The seconds of a duration such as `1 h 4 min` or `4 min 20 s`."""
    units = {"h": 3600, "min": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (h|min|s)\b", text))


def compare(size: str, checkpointing: bool, model: str, folder: Path) -> dict[str, Any]:
    """The figures of one dry run and one run."""
    conversations, epochs = RUNS[size]
    output = folder / "run"
    values = {
        "model.name_or_path": model,
        "training.output_dir": str(output),
        "training.num_train_epochs": epochs,
        "training.gradient_checkpointing": checkpointing,
        "data.train_file": str(training_file(conversations, folder)),
        "data.lore_file": None,
        "data.validation_file": None,
        "generation.max_new_tokens": 32,
    }
    settings = [word for name, value in values.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    command = [sys.executable, str(ROOT / "finetune.py"), "--resume", "never", *settings]
    dry = subprocess.run([*command[:2], "--dry-run", *settings], capture_output=True, encoding="utf-8", cwd=ROOT)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)
    for result in (dry, done):
        if result.returncode:
            raise SystemExit(result.stdout[-2000:] + result.stderr)
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    memory = run["memory"]
    paper = re.search(r"^ *time +about (.*?)[,;]", dry.stdout, re.MULTILINE)
    assert paper is not None, dry.stdout
    expected, took = seconds(paper[1]), seconds(run["summary"]["time"].split(",")[0])
    return {
        "size": size, "checkpointing": checkpointing, "paper_gib": memory["paper_gib"],
        "measured_gib": memory["measured_gib"], "memory_error": memory["error"],
        "expected_s": expected, "took_s": took, "time_error": round(expected / took - 1, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--turns", type=int, default=1, help="repetitions of each (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"135M": "smollm2-135m-instruct"}
        models |= {size: str(random_model(size, folder / size)) for size in args.sizes if size in SHAPES}
        for _ in range(args.turns):
            for size in args.sizes:
                for checkpointing in (False, True):
                    rows.append(compare(size, checkpointing, models[size], folder))
                    print(json.dumps(rows[-1]), flush=True)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
