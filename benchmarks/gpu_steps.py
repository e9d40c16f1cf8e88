"""The measurements of gpu_session.py, each a function from a `Size` and a device to figures for JSON.

The models of steps 2 to 5 are random, in the shape of those that the presets name, so that nothing is downloaded.
"""

import contextlib
import copy
import gc
import importlib.util
import json
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from persona.config import Config, Lora, load_config
from persona.engine import attention, trial
from persona.engine.attention import IN_FORM, NAME, form_of, tree_attention
from persona.engine.flash import BLOCKS, EFFICIENT, FLASH, fused_attention
from persona.engine.fused import fuse
from persona.engine.loss import negative_log_likelihood
from persona.engine.packing import pack, plan_packs
from persona.errors import Interrupted
from persona.evaluate.loaded import load, predict
from persona.evaluate.subject import read_subject
from persona.model.device import DTYPES, choose_precision, is_out_of_memory, nvidia_gpu
from persona.model.loading import add_adapter, keep_gradients_in_4bit
from persona.model.render import Example
from persona.train.devices import ALONE, build_accelerator
from persona.train.doctor import checked
from persona.train.estimate.fit import room_here, with_losses
from persona.train.estimate.memory import OnPaper, Setup
from persona.train.estimate.presets import full_pack, model_config
from persona.train.estimate.speed import seconds as seconds_on_paper
from persona.train.history import read_history
from persona.train.loop import build_optimizer, choose_optimizer
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
        rows = trial._measured(tuned, (trial._plain_loss(tuned, one, device) for one in examples), accelerator)
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
                "gradients": max(relative(tree[1][kind], right) for kind, right in rows[1].items()),
                "scores": sorted(dtypes),
                "same_loss_again": tree[0] == again[0],
                "same_gradients_again": all(tree[1][kind].equal(again[1][kind]) for kind in tree[1]),
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
    weights, products = attention._weights, attention._products

    def seen(rows: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
        scores = products(rows, keys, scale)
        dtypes.add(str(scores.dtype).removeprefix("torch."))
        return scores

    def watched(*arguments: Any) -> torch.Tensor:
        attention._products = seen  # the backward pass multiplies other things too
        try:
            return weights(*arguments)
        finally:
            attention._products = products

    attention._weights = watched
    try:
        yield dtypes
    finally:
        attention._weights = weights


def relative(tensor: torch.Tensor, right: torch.Tensor) -> float:
    """The difference of `tensor` from `right`, as a share of it."""
    return float((tensor.float() - right.float()).norm() / right.float().norm().clamp(min=1e-30))


# --- 4 ----------------------------------------------------------------------------------------------------------------


def fused_forms(size: Size, device: torch.device) -> Figures:
    """Attention over trees by each fused form against blocks: milliseconds forward and backward, and the difference."""
    dtype = DTYPES[choose_precision("auto", device)]
    heads, groups, width = size.heads
    choice = form_of(device, dtype, heads, groups, width)
    figures: Figures = {"precision": str(dtype).removeprefix("torch."), "chosen": choice.form, "reason": choice.reason}
    for tokens in size.trees:
        tree = pack(full_pack(tokens), device, True).tree
        count = tree.longest + sum(end - begin for _, begin, end in tree.segments[1:])
        chance = torch.Generator().manual_seed(0)
        states = [torch.randn(count, n, width, generator=chance).to(device, dtype) for n in (heads, groups, groups)]
        gradient = torch.randn(count, heads, width, generator=chance).to(device, dtype)
        inputs = [state.requires_grad_() for state in states]
        figures[str(tokens)] = _forms(tree, inputs, gradient, device, size.repeat)
    return figures


def _forms(
    tree: Any, states: Sequence[torch.Tensor], gradient: torch.Tensor, device: torch.device, repeat: tuple[int, int]
) -> Figures:
    scale = states[0].shape[2] ** -0.5

    def results(form: str) -> list[torch.Tensor]:
        if form == BLOCKS:
            out = tree_attention(*states, tree, scale)
        else:
            out = fused_attention(*states, tree.calls, scale, form)
        return [out.detach(), *torch.autograd.grad(out, states, gradient)]

    right, figures = results(BLOCKS), {}
    for form in (BLOCKS, FLASH, EFFICIENT):
        try:
            differences = [relative(*pair) for pair in zip(results(form), right, strict=True)]
        except (RuntimeError, AttributeError, TypeError) as error:  # not built in, or not for this GPU
            figures[form] = {"fault": first_line(error)}
            continue
        seconds, _ = timed(partial(results, form), device, repeat)
        figures[form] = {"ms": seconds * 1e3, "difference": max(differences)}
    return figures


def timed(work: Callable[[], Any], device: torch.device, repeat: tuple[int, int] = (0, 1)) -> tuple[float, float]:
    """The median seconds that `work` takes on `device`, and those until Python had started all of it."""
    times = []
    for _ in range(sum(repeat)):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        work()
        queued = time.perf_counter() - begun
        torch.cuda.synchronize(device)
        times.append((time.perf_counter() - begun, queued))
    seconds, queueing = (statistics.median(column) for column in zip(*times[repeat[0] :], strict=True))
    return seconds, queueing


def first_line(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0][:300]}"


# --- 5 ----------------------------------------------------------------------------------------------------------------


def real_steps(size: Size, device: torch.device) -> Figures:
    """Steps of models in the shape of the presets', ours and those of plain Hugging Face + PEFT, and the estimate."""
    figures: Figures = {}
    for name in size.presets:
        config = load_config(ROOT / "config" / "presets" / f"{name}.json", [])
        try:
            figures[name] = _real_step(config, size, device)
        except Exception as error:  # the next model is worth having all the same
            figures[name] = {"fault": first_line(error)}
        give_memory_back()
    return figures


def _real_step(config: Config, size: Size, device: torch.device) -> Figures:
    shape = model_config(config.model.name_or_path)
    if size.tokens is not None:
        shape = _shrunk(shape)
    examples = full_pack(size.tokens or config.training.pack_limit)
    estimate, step = _estimate(config, shape, examples, device)
    full = sum(len(example.prompt_ids) + len(example.reply_ids) for example in examples)
    figures: Figures = {"tokens_computed": step.tokens, "tokens_of_examples": full, "estimate": estimate}
    if estimate["peak_gib"] > estimate["room_gib"]:
        needed = f"{estimate['peak_gib']:.1f} GiB needed, {estimate['room_gib']:.1f} GiB free"
        return figures | {"skipped": needed}
    figures |= _ways(config, shape, examples, size, device)
    ours = figures["ours"]
    for way in ("ours", "packed", "padded"):
        if "seconds" in figures[way]:
            figures[way]["tokens_a_second"] = full / figures[way]["seconds"]
    estimate["error"] = estimate["peak_gib"] / ours["on_gpu_gib"] - 1
    estimate["error_of_tensors"] = estimate["tensors_gib"] / ours["allocated_gib"] - 1
    # the estimate is tensors x factor + context (persona/train/estimate/fit.py)
    estimate["true_factor"] = ours["reserved_gib"] / ours["allocated_gib"]
    estimate["true_context_gib"] = ours["on_gpu_gib"] - ours["reserved_gib"]
    return figures


def _estimate(config: Config, shape: Any, examples: Sequence[Example], device: torch.device) -> tuple[Figures, Any]:
    """The estimate of persona.train.estimate for this GPU, and its step on paper."""
    precision, optimizer = choose_precision("auto", device), choose_optimizer("auto", device)
    checkpointing = config.training.gradient_checkpointing
    setup = Setup(shape, config.lora, config.quantization, precision, device.type, optimizer, checkpointing)
    step, room = OnPaper(setup).step(examples), room_here(device)
    estimate = {
        "peak_gib": with_losses(step.parts, device.type) / GIB,
        "tensors_gib": step.peak / GIB,
        "room_gib": room.bytes / GIB,
    }
    if room.gpu is not None:
        estimate["seconds"] = seconds_on_paper([*step.forward, *step.backward], room.gpu)
    return estimate, step


def _ways(config: Config, shape: Any, examples: Sequence[Example], size: Size, device: torch.device) -> Figures:
    """The figures of our step, and of plain Hugging Face + PEFT with packed and with padded examples."""
    precision, longest = choose_precision("auto", device), 10**6
    accelerator = accelerator_of(precision, device)
    tuned = random_model(shape, config.lora, DTYPES[precision], device)
    reason = trial.prepare_layout(tuned, examples, config.training.pack_limit, accelerator)
    optimizer = build_optimizer(choose_optimizer("auto", device), tuned, config.training)
    bench = _Bench(tuned, optimizer, accelerator, device, size)
    (group,) = plan_packs(examples, longest, reason is None)
    packs = [pack(group, device, reason is None)]
    ours = bench.measured(partial(negative_log_likelihood, tuned), packs)
    ours["layout"] = "shared prefixes" if reason is None else f"rows: {reason}"
    ours["kernels"] = bench.kernels(partial(negative_log_likelihood, tuned), packs)
    trial.keep_rows(tuned)
    return {"ours": ours, "packed": _plain(bench, group, concatenated), "padded": _plain(bench, group, padded)}


@dataclass
class _Bench:
    """A model with its optimizer, whose states and gradients stay while steps are measured."""

    model: Any
    optimizer: Any
    accelerator: Any
    device: torch.device
    size: Size

    def steps(self, loss_of: Callable[[Any], torch.Tensor], batches: Sequence[Any]) -> torch.Tensor:
        """Forward and backward of each batch; returns the sum of the losses."""
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with self.accelerator.autocast():
                loss = loss_of(batch)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def measured(self, loss_of: Callable[[Any], torch.Tensor], batches: Sequence[Any]) -> Figures:
        """The figures of one pass over all `batches`, beside gradients and the optimizer's states."""
        self.model.train()
        loss = self.steps(loss_of, batches).item()
        self.model.zero_grad(set_to_none=False)
        self.optimizer.step()  # makes its states; without gradients and weight decay it changes nothing
        give_memory_back()
        torch.cuda.reset_peak_memory_stats(self.device)
        seconds, queueing = timed(partial(self.steps, loss_of, batches), self.device, self.size.repeat)
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.max_memory_reserved(self.device)
        context = total - free - torch.cuda.memory_reserved(self.device) - self.size.used_before
        return {
            "seconds": seconds,
            "queueing": queueing,
            "allocated_gib": torch.cuda.max_memory_allocated(self.device) / GIB,
            "reserved_gib": reserved / GIB,
            "on_gpu_gib": (reserved + context) / GIB,
            "loss": loss,
        }

    def kernels(self, loss_of: Callable[[Any], torch.Tensor], batches: Sequence[Any]) -> list[tuple[str, int, float]]:
        """The 20 kernels that take longest in one pass: name, calls and milliseconds."""
        on_gpu = ProfilerActivity.CUDA in torch.profiler.supported_activities()
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
            timed(partial(self.steps, loss_of, batches), self.device)
        spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        times = [(one.key[:120], one.count, getattr(one, spent) / 1e3) for one in profiled.key_averages()]
        return sorted(times, key=lambda row: -row[2])[:20]


def _plain(bench: _Bench, examples: Sequence[Example], batch_of: Callable[..., Figures]) -> Figures:
    """The figures of plain Hugging Face + PEFT, with as many examples at a time as the GPU's memory holds."""
    together = len(examples)
    while together:
        batches = [
            batch_of(examples[first : first + together], bench.device) for first in range(0, len(examples), together)
        ]
        try:
            return bench.measured(partial(_plain_loss, bench.model), batches) | {"together": together}
        except Exception as error:
            if not is_out_of_memory(error):
                return {"fault": first_line(error)}
        give_memory_back()
        together //= 2
    return {"fault": "the GPU's memory does not hold one example"}


def _plain_loss(model: Any, batch: Figures) -> torch.Tensor:
    """The sum of the losses of learned tokens, as transformers computes it."""
    return model(**batch, use_cache=False, num_items_in_batch=1).loss


def padded(examples: Sequence[Example], device: torch.device) -> dict[str, torch.Tensor]:
    """One example a row, filled up on the right."""
    width = max(len(example.prompt_ids) + len(example.reply_ids) for example in examples)
    ids, mask, labels = [], [], []
    for example in examples:
        filling = [0] * (width - len(example.prompt_ids) - len(example.reply_ids))
        ids.append([*example.prompt_ids, *example.reply_ids, *filling])
        mask.append([1] * (width - len(filling)) + filling)
        labels.append([*[-100] * len(example.prompt_ids), *example.reply_ids, *[-100] * len(filling)])
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(values, device=device) for name, values in tensors.items()}


def concatenated(examples: Sequence[Example], device: torch.device) -> dict[str, torch.Tensor]:
    """All examples in one row, each with positions of its own, as TRL packs them."""
    ids, positions, labels = [], [], []
    for example in examples:
        whole = [*example.prompt_ids, *example.reply_ids]
        ids += whole
        positions += range(len(whole))
        labels += [*[-100] * len(example.prompt_ids), *example.reply_ids]
    tensors = {"input_ids": ids, "position_ids": positions, "labels": labels}
    return {name: torch.tensor([values], device=device) for name, values in tensors.items()}


def _shrunk(config: Any) -> Any:
    """`config` with two narrow layers."""
    small = copy.deepcopy(config)
    for name, value in {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}.items():  # fmt: skip
        setattr(small, name, value)
    small.layer_types = ["full_attention"] * 2
    return small


def random_model(config: Any, lora: Lora, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of random numbers in 4 bits with an adapter, made on `device` one layer at a time."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(path, _in_4_bits(module, dtype, device))
    for path, weight in list(model.named_parameters()):
        if weight.is_meta:
            owner, _, leaf = path.rpartition(".")
            value = _random(weight.shape, dtype, device) if weight.dim() > 1 else torch.ones_like(weight, device=device)
            model.get_submodule(owner).register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(device)
    model.requires_grad_(False)
    model.config.use_cache = False
    model.is_loaded_in_4bit = True
    keep_gradients_in_4bit(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return add_adapter(model, lora, 0, "random").to(device)


def _in_4_bits(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> Any:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    bias = layer.bias is not None
    quantized: Any = Linear4bit(layer.in_features, layer.out_features, bias, dtype, True, "nf4", device="meta")
    weight = _random(layer.weight.shape, dtype, device)
    quantized.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantized).to(device)
    if bias:
        zeros = torch.zeros(layer.out_features, dtype=dtype, device=device)
        quantized.bias = nn.Parameter(zeros, requires_grad=False)
    return quantized


def _random(shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=device) * 0.02


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
