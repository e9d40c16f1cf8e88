"""One pass of TRL or LLaMA-Factory over the same conversations; throughput.py starts it in their environments.

    python benchmarks/peers.py trl --model DIR --data FILE.jsonl --examples 64

Each makes one optimizer step over the first N conversations in micro-batches of 8: bfloat16, LoRA r=16 on all linear
layers, dropout 0, the base in 16 bits, no gradient checkpointing, the loss on the reply alone. The last line printed is
one JSON object. It needs nothing of this project, and these:

    pip install torch==2.13.0 trl==1.16.0 peft
    pip install torch==2.13.0 llamafactory==0.9.5    (beside a CPU build of torch: pip uninstall torchvision torchaudio,
                                                      and an empty package torchaudio, whose name it imports)
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
ROWS = 8  # conversations in a micro-batch


def trl(model: Path, examples: list[list[dict[str, str]]], packing: bool) -> dict[str, float]:
    """Seconds and loss of TRL's SFTTrainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = 1 if packing else ROWS
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=len(examples) // rows,
            num_train_epochs=1,
            learning_rate=1e-4,
            max_length=1024,
            packing=packing,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            model_init_kwargs={"dtype": torch.bfloat16},
        )
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        dataset = Dataset.from_list([{"prompt": talk[:-1], "completion": talk[-1:]} for talk in examples])
        trainer = SFTTrainer(str(model), args=settings, train_dataset=dataset, peft_config=lora)
        start = time.perf_counter()
        result = trainer.train()
        return {"seconds": time.perf_counter() - start, "train_loss": result.training_loss}


def llamafactory(model: Path, examples: list[list[dict[str, str]]]) -> dict[str, float]:
    """Seconds and loss of llamafactory-cli train."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        columns = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
        rows = [
            {
                "system": talk[0]["content"],
                "instruction": talk[-2]["content"],
                "input": "",
                "output": talk[-1]["content"],
            }
            for talk in examples
        ]
        settings: dict[str, Any] = {
            "model_name_or_path": str(model),
            "template": "chatml",
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "lora_target": "all",
            "dataset_dir": name,
            "dataset": "rows",
            "cutoff_len": 1024,
            "overwrite_cache": True,
            "preprocessing_num_workers": 1,
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": ROWS,
            "gradient_accumulation_steps": len(examples) // ROWS,
            "num_train_epochs": 1.0,
            "learning_rate": 1e-4,
            "bf16": True,
            "use_cpu": True,
            "disable_gradient_checkpointing": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        }
        for file, content in (
            ("rows.json", rows),
            ("dataset_info.json", {"rows": {"file_name": "rows.json", "columns": columns}}),
            ("run.yaml", settings),  # JSON is YAML
        ):
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
        subprocess.run(
            [Path(sys.executable).with_name("llamafactory-cli"), "train", folder / "run.yaml"],
            check=True,
            stdout=sys.stderr,
            env=os.environ | {"DISABLE_VERSION_CHECK": "1"},
        )
        results = json.loads((folder / "out" / "train_results.json").read_text(encoding="utf-8"))
        return {"seconds": results["train_runtime"], "train_loss": results["train_loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["trl", "trl-packed", "llamafactory"], help="tool to measure")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model in 16 bits")
    parser.add_argument("--data", type=Path, required=True, help="JSONL of conversations: system, user, assistant")
    parser.add_argument(
        "--examples", type=int, default=64, help="number of conversations, a multiple of 8 (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.examples % ROWS:
        parser.error(f"--examples must be a multiple of {ROWS}")
    lines = args.data.read_text(encoding="utf-8").splitlines()[: args.examples]
    examples = [json.loads(line)["messages"] for line in lines]
    if args.peer == "llamafactory":
        figures = llamafactory(args.model, examples)
    else:
        figures = trl(args.model, examples, args.peer == "trl-packed")
    who = resource.RUSAGE_CHILDREN if args.peer == "llamafactory" else resource.RUSAGE_SELF
    print(json.dumps(figures | {"peak_rss_gib": resource.getrusage(who).ru_maxrss / 2**20}))


if __name__ == "__main__":
    main()
