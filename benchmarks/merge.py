"""Memory and time of a merge, beside a plain copy of the same files and beside PEFT's own way.

    python benchmarks/merge.py
    python benchmarks/merge.py --shape 1.5b --peft --turns 3

The base is made here: random float16 weights of a 7B (14.5 GB) or 1.5B (3.1 GB) model in shards of 4 GB, and a random
LoRA adapter of rank 16 on all its linear layers. Twice its size has to be free on the disk of --folder; all is removed
in the end. Every measurement is a process of its own, in turn; a copy is flushed to the disk as a merge is.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {  # as Mistral 7B v0.3
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "tie_word_embeddings": False,
    },
    "1.5b": {  # as Qwen2.5 1.5B
        "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152, "tie_word_embeddings": True,
    },
}  # fmt: skip
SHARD_BYTES = 4 * 10**9


def make(shape: str, base: Path, adapter: Path, tokenizer: Path) -> None:
    """Write a random base of `shape` with the tokenizer in `tokenizer`, and a random adapter for it."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    from persona.files import write_json
    from persona.merge.adapter import skeleton
    from persona.merge.weights import BLOCK, Output, Stored, header, shards, write
    from persona.model.adapters import TOKENIZER_FILES

    base.mkdir(parents=True)
    adapter.mkdir()
    for name in (*TOKENIZER_FILES, "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, base / name)
    write_json(base / "config.json", SHAPES[shape] | {"dtype": "float16"})
    model = skeleton(base)
    torch.manual_seed(0)
    noise = (torch.randn(BLOCK) * 0.02).half()
    tied = set(model.all_tied_weights_keys)
    tensors = [
        Output(name, Stored(name, base, 0, torch.float16, tuple(tensor.shape)), torch.float16, [])
        for name, tensor in model.state_dict().items()
        if name not in tied
    ]
    places = {}
    for file_name, group in shards(tensors, SHARD_BYTES).items():
        with (base / file_name).open("wb", buffering=0) as file:
            file.write(header(group))
            for tensor in group:
                for start in range(0, tensor.source.numbers, BLOCK):
                    write(file, noise[: tensor.source.numbers - start])
                places[tensor.name] = file_name
    if len(set(places.values())) > 1:
        write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = PeftModel(model, config, low_cpu_mem_usage=True)
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    weights = {name: torch.randn(tensor.shape) * 0.01 for name, tensor in wanted.items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    config.save_pretrained(adapter)


def measure(way: str, base: Path, adapter: Path, output: Path) -> dict[str, float]:
    """Seconds and peak memory in GiB of one `way` (ours, copy, peft) from `base` and `adapter` to `output`."""
    before, busy = time.perf_counter(), time.process_time()
    if way == "ours":
        import torch

        from persona.config import Generation
        from persona.merge.merge import merge

        merge(base, adapter, output, torch.float16, SHARD_BYTES, Generation(), proof=None)
    elif way == "peft":
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
        merged: Any = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(output, max_shard_size="4GB")
        AutoTokenizer.from_pretrained(base).save_pretrained(output)
    else:
        output.mkdir()
        for path in base.iterdir():
            shutil.copyfile(path, output / path.name)
    if way != "ours":  # which does so itself
        for path in output.iterdir():
            handle = os.open(path, os.O_RDWR)
            os.fsync(handle)
            os.close(handle)
    seconds, busy = time.perf_counter() - before, time.process_time() - busy
    import torch

    from persona.model.device import peak_memory_gib

    return {"seconds": seconds, "busy": busy, "peak_gib": peak_memory_gib(torch.device("cpu"))}


def report(figures: dict[str, list[dict[str, float]]], size: float) -> str:
    """A table of medians, and each way's time over that of the copy of its own turn."""
    lines = ["| | seconds | of a processor | MB/s | peak GiB | times a copy |", "|---|---|---|---|---|---|"]
    for way, runs in figures.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        ratios = [run["seconds"] / copy["seconds"] for run, copy in zip(runs, figures["copy"], strict=True)]
        busy, peak = statistics.median(run["busy"] for run in runs), max(run["peak_gib"] for run in runs)
        lines.append(
            f"| {way} | {seconds:.1f} | {busy:.1f} | {size / seconds / 1e6:.0f} | {peak:.2f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--turns", type=int, default=1, help="how often each way is measured")
    parser.add_argument("--peft", action="store_true", help="measure PEFT's way too, which holds the whole model")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--one", nargs=4, metavar=("WAY", "BASE", "ADAPTER", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one and args.one[0] == "make":
        make(args.shape, *map(Path, args.one[1:]))
        return
    if args.one:
        print(json.dumps(measure(args.one[0], *map(Path, args.one[1:]))))
        return
    from persona.model.embedded import SMOLLM2
    from persona.model.sources import resolve_model

    tokenizer = resolve_model(SMOLLM2.name)
    ways = ["copy", "ours", *(["peft"] if args.peft else [])]
    figures: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    command = [sys.executable, __file__, "--shape", args.shape, "--one"]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        base, adapter, output = (Path(folder) / name for name in ("base", "adapter", "output"))
        # in a process of its own: a process inherits the peak memory of the one that starts it
        subprocess.run([*command, "make", str(base), str(adapter), str(tokenizer)], check=True)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        print(f"{args.shape}: {size / 1e9:.1f} GB", flush=True)
        for _ in range(args.turns):
            for way in ways:
                one = [*command, way, str(base), str(adapter), str(output)]
                done = subprocess.run(one, stdout=subprocess.PIPE, check=True, encoding="utf-8")
                figures[way].append(json.loads(done.stdout.splitlines()[-1]))
                shutil.rmtree(output)
                print(way, figures[way][-1], flush=True)
    print(report(figures, size))


if __name__ == "__main__":
    main()
