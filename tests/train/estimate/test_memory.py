"""The memory of a step on paper: the same as with numbers, and the same from three layers as from all."""

import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from making.packs import CPU, cases
from making.tiny import model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from persona.config import Lora, Quantization
from persona.engine.attention import NAME
from persona.engine.fused import _Norm, fuse
from persona.engine.loss import negative_log_likelihood
from persona.engine.packing import count_tokens, pack, plan_packs
from persona.engine.trial import prepare_layout
from persona.model.loading import add_adapter
from persona.train.estimate.memory import OnPaper, Setup
from persona.train.estimate.paper import META, Paper

pytestmark = pytest.mark.usefixtures("one_thread")


class Counted(TorchDispatchMode):
    """The bytes of tensors with numbers that are made inside and alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {id_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id_of(tensor) not in {*before, *self.sizes}:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.release, storage._cdata)
        return out

    def release(self, key):
        self.live -= self.sizes.pop(key, 0)


def id_of(tensor):
    return tensor.untyped_storage()._cdata


EXAMPLES = [one for name in ("history kept", "nothing in common") for one in cases()[name]]
(GROUP,) = plan_packs(EXAMPLES, 10_000, True)


def setup(config, checkpointing, dropout=0.1, four=False):
    return Setup(
        config, Lora(r=4, lora_dropout=dropout), Quantization(load_in_4bit=four), "fp32", "cpu", "adamw_torch",
        checkpointing,
    )  # fmt: skip


def really_kept(base, checkpointing, dropout):
    """Bytes of the tensors that a step with numbers makes, at its peak, with the gradients of an earlier one."""
    tuned = add_adapter(base, Lora(r=4, lora_dropout=dropout), 0, "tiny").train()
    tuned.get_base_model().set_attn_implementation(NAME)
    fuse(tuned)
    if checkpointing:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for weight in tuned.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    with Counted() as counted:
        negative_log_likelihood(tuned, pack(GROUP, CPU, True)).backward()
    return counted.peak


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["qwen3"])
def test_a_step_on_paper_needs_what_one_with_numbers_needs(kind, checkpointing, dropout):
    base = model(kind, num_hidden_layers=4)
    step = OnPaper(setup(base.config, checkpointing, dropout)).step(GROUP)
    assert step.tokens == count_tokens(GROUP, True)
    passing = step.parts["kept activations"] + step.parts["workspace"]
    assert passing == pytest.approx(really_kept(base, checkpointing, dropout), rel=0.02)
    # on a CPU the holes of all that comes and goes stay, with checkpointing too
    assert step.passing == pytest.approx(really_kept(model(kind, num_hidden_layers=4), False, dropout), rel=0.02)


IN_TURN = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}


@pytest.mark.parametrize(
    ("device", "checkpointing", "four"), [("cpu", False, False), ("cuda", True, True), ("cuda", False, True)]
)
@pytest.mark.parametrize(
    ("kind", "sizes", "run"),
    [
        ("llama", {"num_hidden_layers": 5}, (2, 3)),
        ("gemma4_unified_text", IN_TURN, (2, 4)),
        ("gemma3_text", IN_TURN, (2, 4)),  # layers of one shape, and other attention
        ("gemma4_text", IN_TURN | {"num_kv_shared_layers": 2}, (6, 6)),  # the last two have no keys of their own
    ],
)
def test_a_few_layers_tell_of_all(monkeypatch, kind, sizes, run, device, checkpointing, four):
    one = setup(model(kind, **sizes).config, checkpointing, four=four)
    one = Setup(**{**vars(one), "device": device})
    few = OnPaper(one)
    assert (few.run, few.share) == (run, True)
    short = few.step(GROUP)
    monkeypatch.setattr("persona.train.estimate.memory._period", lambda layers, _: len(layers))
    whole = OnPaper(one)
    assert whole.run == (whole.depth, whole.depth)
    assert few.trial(GROUP) == pytest.approx(whole.trial(GROUP), rel=1e-9)
    whole = whole.step(GROUP)
    assert short.parts == pytest.approx(whole.parts, rel=1e-9)
    assert sum(n for _, n in [*short.forward, *short.backward]) == len(whole.forward) + len(whole.backward)


def test_lasting_parts_are_those_of_the_weights():
    base = model("llama", num_hidden_layers=2)
    parts = OnPaper(setup(base.config, False)).step(GROUP).parts
    tuned = add_adapter(base, Lora(r=4), 0, "tiny")
    learned = sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad)
    assert [parts[name] for name in ("adapter", "gradients", "optimizer states")] == [
        4 * learned,
        4 * learned,
        8 * learned,
    ]
    assert parts["weights in 4 bits"] == 0
    frozen = sum(weight.numel() for weight in base.parameters()) - learned
    buffers = sum(buffer.numel() for buffer in base.buffers())
    assert parts["other weights"] == 4 * (frozen + buffers)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trial_on_paper_needs_what_the_one_before_a_run_needs(checkpointing):
    base = model("qwen3", num_hidden_layers=4)
    one = setup(base.config, checkpointing)
    paper = OnPaper(one)
    parts, peak = paper.step(GROUP).parts, paper.trial(GROUP)
    lasting = sum(parts[name] for name in ("weights in 4 bits", "other weights", "adapter"))
    tuned = add_adapter(base, Lora(r=4, lora_dropout=0.1), 0, "tiny").train()
    if checkpointing:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    accelerator = SimpleNamespace(device=CPU, autocast=nullcontext)
    with Counted() as counted:
        assert prepare_layout(tuned, GROUP, 300, accelerator) is None
    assert peak - lasting == pytest.approx(counted.peak, rel=0.03)


def test_the_trial_of_a_checkpointed_run_is_checkpointed():
    """Otherwise it would be the peak of many presets' memory: 3.92 GiB against 3.26 GiB for the step of Qwen3-4B."""
    config = model("qwen3", num_hidden_layers=12).config
    with_all, checkpointed = (OnPaper(setup(config, checkpointing)).trial(GROUP) for checkpointing in (False, True))
    assert checkpointed < 0.8 * with_all


def test_a_norm_on_a_gpu_is_one_kernel_forward_and_one_backward():
    with Paper(torch.device("cuda"), torch.bfloat16) as paper:
        x, weight = (torch.empty(size, dtype=torch.bfloat16, device=META) for size in ((100, 64), (64,)))
        lasting, one, row = paper.live, 100 * 64 * 2, 100 * 4
        y = _Norm.apply(x.requires_grad_(), weight, 1e-6)
        assert paper.live == lasting + one + row  # the result, and 1 / rms of each row in float32
        paper.backward(y)
    assert [(kernel.name, kernel.moved) for kernel in paper.kernels if kernel.name != "ones_like"] == [
        ("_fused_rms_norm", 2 * one + row + 2 * 64),
        ("_fused_rms_norm_backward", 3 * one + row + 2 * 64),
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trial_of_a_base_in_4_bits_is_counted_on_every_cpu(monkeypatch, checkpointing):
    """In evaluation bitsandbytes repacks 4-bit weights on CPUs with avx512_bf16, which the trial must not do."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    paper = OnPaper(replace(setup(model("llama").config, checkpointing, four=True), precision="bf16"))
    assert paper.trial(EXAMPLES) > paper.step(GROUP).parts["weights in 4 bits"]
