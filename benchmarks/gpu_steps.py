"""The measurements of gpu_session.py that ask whether results are right: the machine, 4 bits, trees, tests, a run.

Each is a function from a `Size` and a device to figures for JSON.
"""

import contextlib
import gc
import importlib.util
import json
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import AutoConfig, AutoModelForCausalLM

from persona.config import Lora, load_config
from persona.engine import attention, trial
from persona.engine.attention import IN_FORM, NAME
from persona.engine.flash import BLOCKS
from persona.engine.fused import fuse
from persona.engine.loss import negative_log_likelihood
from persona.engine.packing import pack, plan_packs
from persona.errors import Interrupted
from persona.evaluate.loaded import load, predict
from persona.evaluate.subject import read_subject
from persona.model.device import DTYPES, nvidia_gpu
from persona.model.loading import add_adapter
from persona.model.render import Example
from persona.train.devices import ALONE, build_accelerator
from persona.train.doctor import checked
from persona.train.estimate.presets import full_pack
from persona.train.history import read_history
from persona.train.run import finetune

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large the session's work is."""

    matrix: int
    """Rows and columns of the matrix in 4 bits."""
    trees: Sequence[int]
    """Tokens of the trees for attention."""
    heads: tuple[int, int, int]
    """Heads, groups of them that share keys, and their size."""
    presets: Sequence[str]
    model: str
    """Model of the whole run."""
    run: dict[str, Any]
    """Settings of the whole run that differ from those of config/default.json."""
    replies: int
    architectures: Sequence[str]
    repeat: tuple[int, int]
    """Repetitions: those before, and those that are timed."""
    tokens: int | None = None
    """Tokens of a pack, if the models of the presets are shrunk to two narrow layers."""
    used_before: float = 0.0
    """Bytes of the GPU that other programs had before."""


FULL = Size(
    matrix=4096,
    trees=(1500, 3500),
    heads=(32, 8, 128),
    presets=("qwen3-4b-8gb", "qwen3-8b-16gb"),
    model="smollm2-135m-instruct",
    run={"training.train_batch_size": 8, "generation.max_new_tokens": 64},
    replies=17,
    architectures=("llama", "qwen2", "qwen3", "mistral"),
    repeat=(2, 5),
)
UPDATES, STOPPED_AFTER = 6, 3


def small(model: str) -> Size:
    """The same steps with little work, for a pretended GPU; `model` is the folder of a tiny model."""
    run = {
        "training.train_batch_size": 1,
        "data.system_prompt": "You keep the lamp.",
        "lora.r": 4,
        "generation.max_new_tokens": 2,
    }
    return Size(
        matrix=64,
        trees=(400,),
        heads=(4, 2, 16),
        presets=("qwen3-4b-8gb",),
        model=model,
        run=run,
        replies=2,
        architectures=("qwen3",),
        repeat=(0, 1),
        tokens=600,
    )


def used_memory() -> float:
    """Bytes of the first GPU that all programs have, as nvidia-smi says; 0 if it is not there."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=20)
        return float(answer.stdout.split()[0]) * 2**20
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return 0.0


# --- 1, 2 -------------------------------------------------------------------------------------------------------------


def machine(size: Size, device: torch.device) -> Figures:
    """The GPU, its system and the lines of finetune.py --doctor."""
    free, total = torch.cuda.mem_get_info()
    listed = nvidia_gpu()
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "memory_gib": round(total / GIB, 2),
        "free_gib": round(free / GIB, 2),
        "used_before_gib": round(size.used_before / GIB, 2),
        "driver": listed[1] if listed else None,
        "system": platform.system(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "flash_built_in": torch.backends.cuda.is_flash_attention_available(),
        "checks": [f"{check.state} {check.name}: {check.text}" for check in checked()],
    }


def four_bits(size: Size, device: torch.device) -> Figures:
    """Codes of 4 bits and their values, made on the GPU and on the CPU from the same numbers."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    figures: Figures = {}
    for precision, dtype in DTYPES.items():
        chance = torch.Generator().manual_seed(0)
        weight = torch.randn(size.matrix, size.matrix, generator=chance).to(dtype)
        codes, values = [], []
        for place in (torch.device("cpu"), device):
            code, state = quantize_4bit(weight.to(place), quant_type="nf4", compress_statistics=True)
            codes.append(code.cpu())
            values.append(dequantize_4bit(code, state).cpu())
        figures[precision] = {
            "codes": codes[0].numel(),
            "codes_that_differ": int((codes[0] != codes[1]).sum()),
            "largest_difference": float((values[0].float() - values[1].float()).abs().max()),
            "dtype": str(values[1].dtype).removeprefix("torch."),
        }
    return figures


# --- 3 ----------------------------------------------------------------------------------------------------------------


def equivalences(size: Size, device: torch.device) -> Figures:
    """Shared trees in our layers against rows in the libraries' layers, for each architecture and precision."""
    examples = trial.trial_examples(full_pack(600))
    return {
        f"{architecture} {precision}": _equivalence(architecture, precision, examples, device)
        for architecture in size.architectures
        for precision in DTYPES
        if precision != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)
    }


def _equivalence(architecture: str, precision: str, examples: Sequence[Example], device: torch.device) -> Figures:
    accelerator = accelerator_of(precision, device)
    tuned = add_adapter(_small_model(architecture, precision, device), Lora(r=4, lora_dropout=0.0), 0, architecture)
    (group,) = plan_packs(examples, 10**6, True)
    packed = pack(group, device, True, trial.TRIAL_BLOCK)
    by_loss, by_gradient = trial.TOLERANCE[DTYPES[precision]]
    figures: Figures = {"allowed": {"loss": by_loss, "gradients": by_gradient}}
    with trial._trial(tuned):
        trial.keep_rows(tuned)
        rows = trial._measured(tuned, (trial.plain_loss(tuned, one, device) for one in examples), accelerator)
        for form, name in (("blocks", IN_FORM[BLOCKS]), ("as in a run", NAME)):
            tuned.get_base_model().set_attn_implementation(name)
            fuse(tuned)
            with scores_seen() as dtypes:
                tree, again = (
                    trial._measured(tuned, (negative_log_likelihood(tuned, one) for one in [packed]), accelerator)
                    for _ in range(2)
                )
            figures[form] = {
                "loss": abs(tree[0] - rows[0]) / abs(rows[0]),
                "gradients": max(trial.difference_of(tree[1][kind], right) for kind, right in rows[1].items()),
                "scores": sorted(dtypes),
                "same_loss_again": tree[0] == again[0],
                "same_gradients_again": all(
                    a.equal(b) for kind in tree[1] for a, b in zip(tree[1][kind], again[1][kind], strict=True)
                ),
            }
    return figures


def accelerator_of(precision: str, device: torch.device) -> Any:
    """An accelerator of another precision than the one before."""
    AcceleratorState._reset_state(True)
    return build_accelerator(precision, device, ALONE)


def _small_model(architecture: str, precision: str, device: torch.device) -> Any:
    """A random model of two layers whose outputs are far from uniform."""
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "head_dim": 32}
    window = {"sliding_window": None} if architecture == "mistral" else {}
    config = AutoConfig.for_model(architecture, initializer_range=0.1, **sizes, **window)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.requires_grad_(False)
    return model.to(DTYPES[precision]).to(device)


@contextlib.contextmanager
def scores_seen() -> Iterator[set[str]]:
    """The precisions of attention's scores that blocks compute inside."""
    dtypes: set[str] = set()
    scores_of = attention._scores

    def watched(*arguments: Any) -> torch.Tensor:
        scores = scores_of(*arguments)
        dtypes.add(str(scores.dtype).removeprefix("torch."))
        return scores

    attention._scores = watched
    try:
        yield dtypes
    finally:
        attention._scores = scores_of


def first_line(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0][:300]}"


def give_memory_back() -> None:
    """Free what nothing uses any more, and let other programs and steps have it."""
    gc.collect()
    torch.cuda.empty_cache()


# --- 6 ----------------------------------------------------------------------------------------------------------------


def gpu_tests(size: Size, device: torch.device) -> Figures:
    """The project's own tests that need a GPU, if the requirements of developers are installed."""
    if size.tokens is not None:
        return {"skipped": "tests that need a real GPU"}
    if missing := [name for name in ("pytest", "pytest_socket", "hypothesis") if not importlib.util.find_spec(name)]:
        return {"skipped": f"{', '.join(missing)} not installed (pip install -r requirements-dev.txt)"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-m", "gpu", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", check=False)
    return {"exit_code": done.returncode} | summary(done.stdout)


def summary(output: str) -> Figures:
    """The counts in the last line of pytest's `output`, and its lines of failures."""
    lines = output.strip().splitlines()
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", lines[-1])} if lines else {}
    wanted = ("passed", "failed", "error", "errors", "skipped")
    failures = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {word: counts[word] for word in wanted if word in counts} | {"failures": failures}


# --- 7 ----------------------------------------------------------------------------------------------------------------


def whole_run(size: Size, device: torch.device) -> Figures:
    """A run at once, the same stopped and continued, its first losses on the CPU, and replies of the tuned model."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, contextlib.chdir(name):
        folder = Path(name)
        write_first_records(folder, UPDATES * size.run["training.train_batch_size"], size.replies)
        once = _trained(size, "once", "cuda", None)
        _trained(size, "stopped", "cuda", STOPPED_AFTER)
        continued = _trained(size, "stopped", "cuda", None)
        on_cpu = _trained(size, "cpu", "cpu", STOPPED_AFTER)
        files = [run / "adapter" / "adapter_model.safetensors" for run in (once, continued)]
        losses = [[loss for _, loss in read_history(run).train][:STOPPED_AFTER] for run in (once, on_cpu)]
        return {
            "continued_byte_for_byte": files[0].read_bytes() == files[1].read_bytes(),
            "continued_difference": _weights_apart(*files),
            "losses": losses[0],
            "losses_on_cpu": losses[1],
            "largest_difference_of_losses": max(abs(a - b) / b for a, b in zip(*losses, strict=True)),
            "replies": _replies(once),
        }


def write_first_records(folder: Path, train: int, held_out: int) -> None:
    """The first records of the sample persona, in train.jsonl and val.jsonl."""
    for name, count in (("train", train), ("val", held_out)):
        lines = (ROOT / "data" / "tamsin" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _trained(size: Size, name: str, device: str, stop_after: int | None) -> Path:
    """The folder of a run in the current folder, stopped after an update or finished."""
    values = {
        "model.name_or_path": size.model,
        "model.device": device,
        "data.train_file": "train.jsonl",
        "data.validation_file": "val.jsonl",
        "data.lore_file": None,
        "data.system_prompt": f"@{ROOT / 'data' / 'tamsin' / 'card.txt'}",
        "training.output_dir": name,
        "training.num_train_epochs": 1,
        "evaluation.eval_steps": STOPPED_AFTER,
        "evaluation.sample_prompts": 0,
        "generation.temperature": 0,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in (values | size.run).items()]
    config = load_config(ROOT / "config" / "default.json", overrides)

    def stop(trainer: Any, update: Any) -> None:
        if trainer.progress.step == stop_after:
            signal.raise_signal(signal.SIGINT)

    AcceleratorState._reset_state(True)
    with contextlib.suppress(Interrupted):
        finetune(config, True, lambda _: None, observers=[stop])
    give_memory_back()
    return Path(name)


def _weights_apart(*files: Path) -> float:
    """The largest difference between two numbers of two adapters."""
    from safetensors.torch import load as load_tensors

    left, right = (load_tensors(file.read_bytes()) for file in files)
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


def _replies(run: Path) -> Figures:
    """The speed of writing a reply to each held-out conversation, by the tuned model and by its base."""
    subject = read_subject(str(run), None, [], None, None, None)
    loaded = load(subject, True, 8, lambda step: lambda *_: None, True, print)
    begun = time.perf_counter()
    predictions, _ = predict(loaded)
    seconds = time.perf_counter() - begun
    texts = [one.predict for side in (predictions.tuned, predictions.base or []) for one in side]
    encode = loaded.speaker.fmt.tokenizer
    tokens = sum(len(encode(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return {"replies": len(texts), "seconds": seconds, "tokens": tokens, "tokens_a_second": tokens / seconds}
