"""The measurements of gpu_session.py that ask how fast it is: fused attention, and whole steps of random models.

The models have the shape of those that the presets name, so that nothing is downloaded.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_steps import GIB, ROOT, Figures, Size, accelerator_of, first_line, give_memory_back
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from persona.config import Config, Lora, load_config
from persona.engine import trial
from persona.engine.attention import Softmax, form_of, tree_attention
from persona.engine.flash import BLOCKS, EFFICIENT, FLASH, fused_attention
from persona.engine.loss import negative_log_likelihood
from persona.engine.packing import pack, plan_packs
from persona.model.device import DTYPES, choose_precision, is_out_of_memory
from persona.model.loading import add_adapter, keep_gradients_in_4bit
from persona.model.render import Example
from persona.train.estimate.fit import room_here, with_losses
from persona.train.estimate.memory import OnPaper, Setup
from persona.train.estimate.presets import full_pack, model_config
from persona.train.estimate.speed import seconds as seconds_on_paper
from persona.train.loop import build_optimizer, choose_optimizer


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
            out = tree_attention(*states, tree, Softmax(scale))
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


def relative(tensor: torch.Tensor, right: torch.Tensor) -> float:
    """The difference of `tensor` from `right`, as a share of it."""
    return float((tensor.float() - right.float()).norm() / right.float().norm().clamp(min=1e-30))


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
        "peak_gib": with_losses(step, device.type) / GIB,
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
