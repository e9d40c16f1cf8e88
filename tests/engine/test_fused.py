"""Fused layers compute what the libraries' own layers do, with the same random numbers, and keep fewer tensors."""

from collections import Counter

import pytest
import torch
from making.kept import Kept
from making.packs import with_adapter
from making.pretended_gpu import PretendedGpu
from making.tiny import family, model, save_model

from persona.config import Quantization
from persona.engine import fused
from persona.model.loading import load_base

pytestmark = pytest.mark.usefixtures("one_thread")


class SameMask(torch.nn.Dropout):
    """The dropout of the libraries' own layers, with the mask that a fused layer draws."""

    def forward(self, x):
        share, seed = fused._drawn(self)
        return x * fused._mask(x, share, seed) / (1 - share / fused.DROPOUT_UNIT) if share else x


def with_dropout(tuned, dropout):
    for module in tuned.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = SameMask(dropout)
    return tuned


IDS = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(0))


def trained(tuned, precision="fp32", seed=3):
    """The loss, the gradients, and the random state that they leave."""
    tuned.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        ids = IDS.to(tuned.device)
        loss = tuned(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, [w.grad.clone() for w in tuned.parameters() if w.requires_grad], torch.get_rng_state()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_fused_layers_compute_what_the_libraries_do(tmp_path, precision, bits, dropout):
    folder = save_model(tmp_path / "qwen2", "qwen2", family("chatml_default"))
    base = load_base(folder, Quantization(load_in_4bit=bits == 4), precision, torch.device("cpu"))
    tuned = with_dropout(with_adapter(base), dropout)
    results = []
    for put in (fused.unfuse, fused.fuse):
        put(tuned)
        results.append(trained(tuned, precision))
    rounding = 2e-6 if precision == "fp32" else 0.05
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=rounding)
    for right, result in zip(results[0][1], results[1][1], strict=True):
        assert right.norm() > 0
        assert (result - right).norm() <= 5 * rounding * right.norm()
    assert torch.equal(results[0][2], results[1][2])


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_follows_the_random_state_alone():
    tuned = with_dropout(with_adapter(model("llama")), 0.4)
    fused.fuse(tuned)
    first, again, other = (trained(tuned, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip((first[0], *first[1]), (again[0], *again[1]), strict=True))
    assert first[0] != other[0]
    tuned.eval()
    without = trained(tuned)
    torch.manual_seed(3)
    assert torch.equal(without[2], torch.get_rng_state())  # nothing is drawn
    assert torch.equal(without[0], trained(with_dropout(tuned, 0.0))[0])


def test_activations_computed_again_draw_the_same_masks():
    tuned = with_dropout(with_adapter(model("llama")), 0.4)
    fused.fuse(tuned)
    right = trained(tuned)
    tuned.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = trained(tuned)
    for a, b in zip((right[0], *right[1], right[2]), (again[0], *again[1], again[2]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.001, 0.05, 0.5, 0.99])
def test_a_mask_drops_its_share_and_no_two_are_alike(dtype, dropout):
    torch.manual_seed(0)
    layer = torch.nn.Dropout(dropout)
    x = torch.ones(501, 333, dtype=dtype)
    (share, seed), (_, next_seed) = fused._drawn(layer), fused._drawn(layer)
    masks = [fused._mask(x, share, number) for number in (seed, next_seed, seed)]
    assert masks[0].dtype == dtype
    assert set(masks[0].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks[0], masks[2])
    dropped = [1 - mask.double().mean().item() for mask in masks]
    deviation = (dropout * (1 - dropout) / x.numel()) ** 0.5
    assert share / fused.DROPOUT_UNIT == pytest.approx(dropout, abs=2**-17)
    assert all(abs(part - dropout) < 5 * deviation + 2**-17 for part in dropped)
    both = ((1 - masks[0].double()) * (1 - masks[1].double())).mean().item()
    assert abs(both - dropout**2) < 5 * dropout * x.numel() ** -0.5  # they are independent
    assert torch.equal(masks[0][:2], fused._mask(x[:2], share, seed))  # made number by number, in order


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_branches_for_a_gpu_compute_what_the_libraries_do(dropout, checkpointing):
    tuned = with_dropout(with_adapter(model("qwen3")), dropout)
    if checkpointing:
        tuned.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with PretendedGpu() as gpu:
        tuned.to("cuda")
        right = trained(tuned)
        gpu.launches.clear()
        gpu.waits.clear()
        fused.fuse(tuned)
        result = trained(tuned)
    assert not gpu.mixes
    assert [place for place, _ in gpu.waits if "engine/fused" in place] == []
    times, norms = 1 + checkpointing, 4 * tuned.config.num_hidden_layers
    assert gpu.launches["_fused_rms_norm"] == times * norms + 1
    # the embeddings, which the first norm reads, have a gradient only if activations are computed again
    assert gpu.launches["_fused_rms_norm_backward"] == norms + checkpointing
    masks = 7 * tuned.config.num_hidden_layers if dropout else 0
    assert gpu.launches["bernoulli_"] == (times + 1) * masks
    assert result[0].item() == pytest.approx(right[0].item(), rel=2e-6)
    for a, b in zip(result[1], right[1], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_generator_of_the_cpu_draws_nothing_on_a_gpu():
    with PretendedGpu():
        with pytest.raises(RuntimeError, match="generator"):
            torch.empty(5, device="cuda").bernoulli_(0.5, generator=torch.Generator())
        with pytest.raises(RuntimeError, match="generator"):
            torch.empty(5).bernoulli_(0.5, generator=torch.Generator("cuda"))


# --- what is kept for the backward pass ------------------------------------------------------------------------------


def kept(tuned, put, checkpointing):
    """Bytes that a forward pass through the layers leaves for the backward pass."""
    base = tuned.get_base_model()
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        base.gradient_checkpointing_disable()
    put(tuned)
    embedded = base.get_input_embeddings()(IDS).requires_grad_()
    with Kept() as alive:
        out = base.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    size = alive.bytes - out.numel() * out.element_size()
    out.sum().backward()
    return size


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_checkpoint_keeps_no_more_than_in_the_libraries_layers(tmp_path, bits, dropout):
    folder = save_model(tmp_path / "llama", "llama", family("chatml_default"))
    base = load_base(folder, Quantization(load_in_4bit=bits == 4), "fp32", torch.device("cpu"))
    tuned = with_dropout(with_adapter(base), dropout)
    theirs, ours = (kept(tuned, put, True) for put in (fused.unfuse, fused.fuse))
    inputs = tuned.config.num_hidden_layers * IDS.numel() * tuned.config.hidden_size * 4
    assert inputs <= ours <= theirs < 3 * inputs


def test_dropout_keeps_nothing():
    tuned = with_adapter(model("llama"))
    with_none, with_some = (kept(with_dropout(tuned, share), fused.fuse, False) for share in (0.0, 0.4))
    assert with_some == with_none < 0.5 * kept(tuned, fused.unfuse, False)


@pytest.mark.parametrize("bits", [4, 16])
def test_all_of_a_known_model_is_fused(tmp_path, bits):
    folder = save_model(tmp_path / "qwen3", "qwen3", family("chatml_default"))
    tuned = with_adapter(load_base(folder, Quantization(load_in_4bit=bits == 4), "fp32", torch.device("cpu")))
    fused.fuse(tuned)
    kinds = Counter(vars(module)["forward"].func.__name__ for module in tuned.modules() if "forward" in vars(module))
    # two layers of 7 linear ones and 4 norms (two of them on queries and keys), and the norm at the end
    assert kinds == {"_adapted": 14, "_norm": 9, "_gated": 2}


# --- norms -----------------------------------------------------------------------------------------------------------


def normed(norm, x, forward):
    rows = x.clone().requires_grad_()
    out = forward(rows)
    (out * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    return out, rows.grad


@pytest.fixture
def norm():
    made = model("llama").model.norm
    torch.manual_seed(0)
    with torch.no_grad():
        made.weight.normal_()
    return made.requires_grad_(False)


def test_a_norm_computed_in_parts_is_that_of_transformers(norm, monkeypatch):
    monkeypatch.setattr(fused, "ROWS", 7)
    x = torch.randn(2, 25, 64)
    results = [normed(norm, x, forward) for forward in (norm, lambda rows: fused._norm(norm, rows))]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert fused._norm(norm, x.bfloat16()).dtype == norm(x.bfloat16()).dtype == torch.float32


@pytest.fixture
def norms_in_one_kernel(monkeypatch):
    """The calls of a GPU's kernels by name; on the CPU torch has the first, and the second as its own reference."""
    from torch._decomp.decompositions import _fused_rms_norm_backward as reference

    calls = []

    def forward(*args, right=torch.ops.aten._fused_rms_norm):
        calls.append("forward")
        return right(*args)

    def backward(*args):
        calls.append("backward")
        return reference(*args)

    monkeypatch.setattr(fused, "_has_kernel", lambda x, weight: x.dtype == weight.dtype)
    monkeypatch.setattr(torch.ops.aten, "_fused_rms_norm", forward)
    monkeypatch.setattr(torch.ops.aten, "_fused_rms_norm_backward", backward)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 25, 64), (1, 7, 4, 16)])
def test_the_kernel_of_a_gpu_computes_the_norm_of_transformers(dtype, shape, norm, norms_in_one_kernel):
    norm.weight.data = norm.weight[: shape[-1]].to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype) * 3
    one = normed(norm, x, lambda rows: fused._norm(norm, rows))
    assert norms_in_one_kernel == ["forward", "backward"]
    norm.weight.data = norm.weight.float()
    right = normed(norm, x.float(), norm)
    for result, exact in zip(one, right, strict=True):
        assert result.dtype == dtype
        rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert (result - exact).norm() <= rounding * exact.norm()


def test_the_kernel_of_a_gpu_changes_no_gradient_of_a_model(norms_in_one_kernel):
    tuned = with_adapter(model("qwen3"))
    right = trained(tuned)
    fused.fuse(tuned)
    result = trained(tuned)
    norms = 4 * tuned.config.num_hidden_layers + 1
    # the first norm reads the embeddings, which have no gradient
    assert Counter(norms_in_one_kernel) == {"forward": norms, "backward": norms - 1}
    for a, b in zip(result[1], right[1], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_norm_of_two_dtypes_goes_without_the_kernel(norm, norms_in_one_kernel):
    x = torch.randn(2, 25, 64).bfloat16()
    results = [normed(norm, x, forward) for forward in (norm, lambda rows: fused._norm(norm, rows))]
    torch.testing.assert_close(results[1], results[0], rtol=0.02, atol=0.02)
    assert not norms_in_one_kernel


def test_of_a_gated_layer_gate_and_up_are_kept_and_their_product_is_not():
    tuned = with_adapter(model("llama"))
    fused.fuse(tuned)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = tuned(input_ids=torch.arange(20)[None]).logits.sum()
    wide = [tensor for tensor in kept if tensor.shape == (1, 20, tuned.config.intermediate_size)]
    assert len({tensor.data_ptr() for tensor in wide}) == 2 * tuned.config.num_hidden_layers
    loss.backward()


def test_layers_with_more_to_them_keep_their_own_forward():
    from peft import LoraConfig, get_peft_model

    dora = get_peft_model(model("llama"), LoraConfig(r=4, target_modules="all-linear", use_dora=True))
    fused.fuse(dora)
    adapted = [module for module in dora.modules() if hasattr(module, "lora_A")]
    assert adapted
    assert not any("forward" in vars(module) for module in adapted)


def test_a_fused_model_obeys_a_switched_off_adapter():
    tuned = with_adapter(model("llama"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        right = tuned.get_base_model()(input_ids=ids).logits
        with tuned.disable_adapter():
            base = tuned(input_ids=ids).logits
        fused.fuse(tuned)
        assert torch.allclose(tuned(input_ids=ids).logits, right, atol=1e-5)
        with tuned.disable_adapter():
            assert torch.equal(tuned(input_ids=ids).logits, base)
    assert not torch.allclose(base, right, atol=1e-3)
