"""Fused attention over prefix trees against the blocks: the calls, both kernels, the choice of a form, fallbacks."""

import random
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from making import pretended_kernels, runs
from making.packs import CPU, cases, with_adapter
from making.pretended_gpu import CUDA, PretendedGpu
from making.tiny import family, model, save_model
from torch.utils._python_dispatch import TorchDispatchMode

from persona.engine import attention, flash, trial
from persona.engine.attention import IN_FORM, NAME, NotCarried, Softmax, form_of, tree_attention
from persona.engine.flash import BLOCKS, EFFICIENT, FLASH, Passed, choose, fused_attention
from persona.engine.loss import negative_log_likelihood
from persona.engine.packing import Tree, inputs, pack, plan_packs
from persona.model.render import Example
from persona.train.run import finetune

pytestmark = pytest.mark.usefixtures("one_thread")
FUSED = (FLASH, EFFICIENT)
OPERATIONS = [f"_{name}_attention_{way}" for name in FUSED for way in ("forward", "backward")]


@pytest.fixture(autouse=True)
def _tried_anew():
    attention._fault.cache_clear()
    yield
    attention._fault.cache_clear()


@pytest.fixture
def any_type(monkeypatch):
    """The kernels' stand-ins without the limits on types and sizes, so that float32 shows what is exact."""
    monkeypatch.setattr(pretended_kernels, "_flash_limits", lambda *_: None)


@pytest.fixture
def stand_ins(monkeypatch, any_type):
    """aten's operations for CUDA, computed by FlashAttention for the CPU."""
    for name in OPERATIONS:
        monkeypatch.setattr(torch.ops.aten, name, partial(pretended_kernels.KERNELS[name], None))


def forest(seed, device=CPU):
    """A pack of random examples that often begin alike, and queries, keys, values and a gradient for it."""
    chance = random.Random(seed)

    def ids(most):
        return tuple(chance.randrange(2) for _ in range(chance.randrange(1, most)))

    group = plan_packs([Example(ids(12), ids(8)) for _ in range(chance.randrange(2, 10))], 10**6, True)[0]
    packed = pack(group, device, True, 7)
    numbers = torch.Generator().manual_seed(seed)
    tokens = packed.input_ids.numel()
    rows = [torch.randn(tokens, heads, 8, generator=numbers).to(device) for heads in (4, 2, 2, 4)]
    return packed.tree, [x.requires_grad_() for x in rows[:3]], rows[3]


def results(attend, rows, grad):
    out = attend(*rows)
    return out, *torch.autograd.grad(out, rows, grad)


def apart(found, wanted):
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(found, wanted, strict=True))


def compare(seeds, device, forms=FUSED):
    """The numbers of calls of the forests of `seeds`; each fused form must agree with the blocks."""
    calls = []
    for seed in seeds:
        tree, rows, grad = forest(seed, device)
        wanted = results(lambda q, k, v, tree=tree: tree_attention(q, k, v, tree, Softmax(0.35)), rows, grad)
        for form in forms:
            found = results(
                lambda q, k, v, tree=tree, form=form: fused_attention(q, k, v, tree.calls, 0.35, form), rows, grad
            )
            assert apart(found, wanted) < 1e-5, (seed, form)
        calls.append(len(tree.calls))
    return calls


def test_three_hundred_random_forests(stand_ins):
    calls = compare(range(300), CPU)
    assert len(calls) == 300
    assert set(calls) >= {1, 2, 3, 4, 5}


@pytest.mark.parametrize("form", FUSED)
def test_random_forests_on_the_pretended_gpu(form, any_type):
    with PretendedGpu(strict=False) as gpu:
        assert max(compare(range(20), CUDA, [form])) >= 4
        assert gpu.launches[f"_{form}_attention_backward"] >= 20
    assert gpu.mixes == []
    assert {place for place, _ in gpu.waits if place.startswith("engine/")} == set()


def test_branches_of_one_beginning_take_two_calls(stand_ins):
    stem = (9, 8, 7)
    group = plan_packs([Example((*stem, n), (1, 2, 3)) for n in range(4)], 100, True)[0]
    first, second = pack(group, CPU, True).tree.calls
    assert first.queries.starts.tolist() == first.keys.starts.tolist() == [0, 3, 6, 9, 12, 15]
    assert first.causal
    assert not second.causal
    assert (second.queries.rows, second.keys.rows) == (slice(3, 15), slice(0, 3))


def test_a_conversation_that_goes_on_is_one_node():
    longer = [Example(tuple(range(n)), (n, n + 1)) for n in (3, 6, 9)]
    assert len(pack(longer, CPU, True).tree.calls) == 1


class Shapes(TorchDispatchMode):
    """Torch checks the arguments of operations on the meta device; of one, its own description lacks an argument."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._efficient_attention_backward.default:
            grad, query, key, value, _, out, starts, _, most_queries, _, lse = args[:11]
            assert grad.shape == query.shape == out.shape
            assert key.shape == value.shape
            assert lse.shape == (len(starts) - 1, query.shape[2], -(-most_queries // 32) * 32)
            return (*(torch.empty_like(x) for x in (query, key, value)), query.new_empty(0))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FUSED)
def test_the_real_operations_take_these_arguments(form):
    group = plan_packs(cases()["history kept"], 10**6, True)[0]
    packed = pack(group, torch.device("meta"), True)
    query, key, grad = (
        torch.empty(n, packed.input_ids.numel(), 64, device="meta", dtype=torch.bfloat16) for n in (4, 2, 4)
    )
    query, key, grad = (x.transpose(0, 1) for x in (query, key, grad))
    assert len(packed.tree.calls) > 2
    with Shapes():
        out, lse = flash.forward(query, key, key, packed.tree.calls, 0.1, form)
        grads = flash.backward(Passed(grad, query, key, key, out, lse), packed.tree.calls, 0.1, form)
    assert out.shape == query.shape
    assert lse.shape == (4, len(query))
    assert [x.shape for x in grads] == [query.shape, key.shape, key.shape]
    assert {x.dtype for x in (out, *grads)} == {torch.bfloat16}


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "has_flash", "dtype", "size", "form", "reason"),
    [
        ((8, 9), True, torch.bfloat16, 128, FLASH, "built in"),
        ((8, 0), True, torch.float16, 64, FLASH, "built in"),
        ((12, 0), True, torch.bfloat16, 256, FLASH, "built in"),
        ((8, 9), True, torch.bfloat16, 208, EFFICIENT, "heads of 208"),
        ((8, 9), False, torch.bfloat16, 128, EFFICIENT, "without FlashAttention"),
        ((7, 5), True, torch.float16, 128, EFFICIENT, "needs compute capability 8.0"),
        ((7, 5), True, torch.bfloat16, 128, BLOCKS, "7.5 has no fused kernels for bfloat16"),
        ((6, 1), True, torch.float16, 128, BLOCKS, "6.1 has no"),
        ((8, 9), True, torch.float32, 128, BLOCKS, "16 bits, and this is float32"),
        ((8, 9), True, torch.bfloat16, 320, BLOCKS, "these have 320"),
        ((8, 9), True, torch.bfloat16, 60, BLOCKS, "these have 60"),
    ],
)
def test_the_form_and_why(capability, has_flash, dtype, size, form, reason):
    choice = choose("cuda", capability, has_flash, dtype, size)
    assert choice.form == form
    assert reason in choice.reason
    with PretendedGpu(capability=capability, has_flash=has_flash):
        assert form_of(CUDA, dtype, 4, 2, size).form == form


def test_the_cpu_has_the_blocks():
    choice = form_of(CPU, torch.bfloat16, 4, 2, 64)
    assert choice.form == BLOCKS
    assert "for CUDA, and this is cpu" in choice.reason


def fails(gpu, *_, **__):
    raise NotImplementedError("no kernel image is available\nfor execution on the device")


def ten_percent_more(kernel, *args, **options):
    out, *rest = kernel(*args, **options)
    return out * 1.1, *rest


@pytest.mark.parametrize(
    ("broken", "wrong", "form", "reason"),
    [
        (["_flash_attention_forward"], fails, EFFICIENT, "without FlashAttention"),
        (["_flash_attention_backward"], ten_percent_more, EFFICIENT, "without FlashAttention"),
        (OPERATIONS, fails, BLOCKS, "flash attention failed: no kernel image is available and efficient"),
        (OPERATIONS, ten_percent_more, BLOCKS, "% off and efficient attention was "),
    ],
)
def test_a_kernel_that_is_missing_or_wrong_is_not_used(broken, wrong, form, reason, monkeypatch):
    for name in broken:
        kernel = pretended_kernels.KERNELS[name]
        monkeypatch.setitem(pretended_kernels.KERNELS, name, fails if wrong is fails else partial(wrong, kernel))
    with PretendedGpu():
        choice = form_of(CUDA, torch.bfloat16, 4, 2, 64)
    assert choice.form == form
    assert reason in choice.reason


def test_a_full_memory_is_not_a_missing_kernel(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setitem(pretended_kernels.KERNELS, "_flash_attention_forward", full)
    with PretendedGpu(), pytest.raises(torch.OutOfMemoryError):
        form_of(CUDA, torch.bfloat16, 4, 2, 64)


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FUSED)
@pytest.mark.parametrize("case", ["history kept", "history rewritten", "reply begins another reply"])
def test_a_model_learns_the_same_in_each_form(form, case, stand_ins):
    tuned = with_adapter(model("qwen2"))
    packed = pack(plan_packs(cases()[case], 10**6, True)[0], CPU, True)
    found = []
    for name in (NAME, IN_FORM[form]):
        tuned.get_base_model().set_attn_implementation(name)
        tuned.zero_grad()
        loss = negative_log_likelihood(tuned, packed)
        loss.backward()
        found.append([loss, *(w.grad for w in tuned.parameters() if w.requires_grad)])
    assert apart(found[1], found[0]) < 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", family("chatml_default"))


def trained(tmp_path, folder, gpu, precision="bf16"):
    """What a short run on `gpu` prints."""
    training = {"precision": precision, "num_train_epochs": 1, "train_batch_size": 8, "max_tokens_per_pack": 150}
    messages = []
    with gpu:
        finetune(runs.config(tmp_path, folder, train=8, held_out=2, training=training), True, messages.append)
    assert gpu.mixes == []
    return "\n".join(messages)


@pytest.mark.parametrize(
    ("form", "options", "precision"),
    [(FLASH, {}, "bf16"), (EFFICIENT, {"has_flash": False}, "bf16"), (EFFICIENT, {"capability": (7, 5)}, "fp16")],
)
def test_a_run_on_a_gpu_computes_its_trees_by_fused_kernels(tmp_path, folder, own_process, form, options, precision):
    gpu = PretendedGpu(**options)
    text = trained(tmp_path, folder, gpu, precision)
    assert "shared prefixes" in text
    assert re.search(rf"attention +{form}: ", text)
    counts = {name: gpu.launches[f"_{name}_attention_backward"] for name in FUSED}
    assert counts.pop(form) > 20
    assert not any(counts.values())
    # packs follow each other without a wait: only the trials read their results
    waiting = {place.partition(" via")[0] for place, _ in gpu.waits if place.startswith("engine/")}
    assert {place for place in waiting if "trial" not in place and "_fault" not in place} == set()


class Accelerator(SimpleNamespace):
    device, num_processes = CUDA, 1

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16)


def tried(monkeypatch, wrong):
    """The reason for rows, and the attention that a trial with `wrong` kernels leaves."""
    monkeypatch.setattr(attention, "_fault", lambda *_: None)  # the kernels pass on the small tree
    for name, kernel in wrong.items():
        monkeypatch.setitem(pretended_kernels.KERNELS, name, kernel)
    with PretendedGpu():
        tuned = with_adapter(model("qwen2").to(torch.bfloat16).to(CUDA))
        reason = trial.prepare_layout(tuned, cases()["history kept"], 300, Accelerator())
        return reason, tuned.config._attn_implementation


def test_a_fused_form_that_fails_the_trial_gives_way_to_the_blocks(monkeypatch):
    right = pretended_kernels.KERNELS["_flash_attention_backward"]
    assert tried(monkeypatch, {}) == (None, NAME)
    wrong = {"_flash_attention_backward": lambda *args, **options: [3 * x for x in right(*args, **options)]}
    assert tried(monkeypatch, wrong) == (None, IN_FORM[BLOCKS])


def test_rows_come_after_the_blocks(monkeypatch):
    monkeypatch.setattr(attention, "_weights", lambda scores, *_: torch.zeros_like(scores))
    right = pretended_kernels.KERNELS["_flash_attention_backward"]
    wrong = {"_flash_attention_backward": lambda *args, **options: [3 * x for x in right(*args, **options)]}
    reason, name = tried(monkeypatch, wrong)
    assert "in a trial before the first update" in reason
    assert name == "sdpa"


@pytest.mark.parametrize("options", [{"has_flash": False}, {"has_flash": True}])
def test_rows_leave_no_groups_to_torch_without_flash_attention(options, monkeypatch):
    heads = []
    plain = F.scaled_dot_product_attention

    def seen(query, key, value, **rest):
        heads.append((query.shape[1], key.shape[1], rest.pop("enable_gqa", False)))
        return plain(query, key, value, **rest, enable_gqa=heads[-1][2])

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    example = cases()["history kept"][0]
    right = negative_log_likelihood(model("llama").bfloat16(), pack([example], CPU, True))
    heads.clear()
    with PretendedGpu(**options):
        made = attention.take_over(model("llama").bfloat16().to(CUDA))
        assert made.config._attn_implementation == NAME
        loss = negative_log_likelihood(made, pack([example], CUDA, False))
        assert loss.item() == pytest.approx(right.item(), rel=1e-2)
    assert set(heads) == ({(4, 2, True)} if options["has_flash"] else {(4, 4, False)})


# --- what a tree does not carry --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["stablelm", "nemotron"])
def test_a_model_that_drops_the_tree_is_refused_and_trained_in_rows(architecture, monkeypatch):
    tuned = with_adapter(model(architecture))
    monkeypatch.setattr(trial, "why_not", lambda *_: None)
    accelerator = SimpleNamespace(device=CPU, autocast=lambda: torch.autocast("cpu", enabled=False))
    assert "hand the prefix tree on" in trial.prepare_layout(tuned, cases()["history kept"], 300, accelerator)
    assert tuned.config._attn_implementation == "sdpa"
    tuned.get_base_model().set_attn_implementation(NAME)
    with pytest.raises(NotCarried, match="hand the prefix tree on"):
        negative_log_likelihood(tuned, pack(plan_packs(cases()["history kept"], 10**6, True)[0], CPU, True))


@pytest.mark.parametrize("option", ["position_bias", "sinks", "cache", "attention_chunk_size", "unheard_of"])
def test_anything_that_attention_is_asked_for_and_does_not_carry_raises(option):
    tree, rows = Tree([((), 0, 9)], CPU), torch.zeros(1, 2, 9, 8)
    for form in (None, *FUSED):
        with pytest.raises(NotCarried, match=option):
            attention._attend(form, None, rows, rows, rows, None, tree=tree, **{option: 0.5})
        for harmless in (
            {"position_ids": torch.arange(9)},
            {"use_cache": False},
            {"unheard_of": None},
            {"dropout": 0.5},
        ):
            attention._attend(BLOCKS, None, rows, rows, rows, None, tree=tree, **harmless)


def test_attention_in_both_directions_and_trained_sinks_raise():
    tree, rows = Tree([((), 0, 9)], CPU), torch.zeros(1, 2, 9, 8)
    with pytest.raises(NotCarried, match="both directions"):
        attention._attend(None, SimpleNamespace(is_causal=False), rows, rows, rows, None, tree=tree)
    with pytest.raises(NotCarried, match="trained sinks"):
        attention._attend(None, None, rows, rows, rows, None, tree=tree, s_aux=torch.zeros(2, requires_grad=True))


def test_a_mask_of_nothing_makes_every_use_of_it_a_nan():
    tuned = model("llama")
    masks = []
    tuned.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    tuned.set_attn_implementation(NAME)
    negative_log_likelihood(tuned, pack(plan_packs(cases()["history kept"], 10**6, True)[0], CPU, True))
    assert masks[0].shape == (1, 1, 1, 1)
    assert masks[0].isnan().all()


MORE = {"sliding_window": 24, "softcap": 2.0, "s_aux": torch.ones(2), "values": 4}


@pytest.mark.parametrize("form", FUSED)
@pytest.mark.parametrize("more", [*MORE, None])
def test_the_blocks_take_all_that_the_fused_kernels_do_not_carry(more, form, monkeypatch):
    calls = []
    for name in ("tree_attention", "fused_attention"):
        right = getattr(attention, name)
        monkeypatch.setattr(
            attention,
            name,
            lambda *args, n=name, f=right: calls.append(n) or tree_attention(*args[:3], tree, Softmax(1.0)),
        )
    tree = Tree([((), 0, 20), (range(20), 20, 25), (range(10), 25, 39)], CPU)
    assert tree.longest == 25
    rows = torch.zeros(1, 2, 39, 8)
    values = rows[..., :4] if more == "values" else rows
    options = {more: MORE[more]} if more in MORE and more != "values" else {"sliding_window": 25}
    out, _ = attention._attend(form, None, rows, rows, values, None, tree=tree, **options)
    assert calls == ["fused_attention" if more is None else "tree_attention"]
    assert out.shape == (1, 39, 2, values.shape[3])


# --- index tensors ---------------------------------------------------------------------------------------------------


def test_a_pack_is_laid_out_without_a_wait():
    group = plan_packs(cases()["history rewritten"], 10**6, True)[0]
    with PretendedGpu() as gpu:
        packed = pack(group, CUDA, True)
        assert packed.tree.calls
        assert packed.tree.blocks
        rows = pack(group, CUDA, False)
        assert not gpu.waits
    right = pack(group, CPU, True)
    assert torch.equal(packed.input_ids, right.input_ids)
    assert torch.equal(rows.targets, pack(group, CPU, False).targets)
    assert len(rows.input_ids) == len(group)
    assert rows.input_ids.shape[1] == max(len(inputs(example)) for example in group)


def test_an_example_alone_is_a_tree_on_a_gpu():
    example = cases()["history kept"][0]
    with PretendedGpu() as gpu:
        packed = pack([example], CUDA, True)
        made = model("llama").bfloat16().to(CUDA)
        made.set_attn_implementation(NAME)
        before = gpu.waits.total()
        assert negative_log_likelihood(made, packed).isfinite()
        assert gpu.launches["_flash_attention_forward"] == 2 + 2  # two layers, and the trial of the kernel
        assert len(packed.tree.calls) == 1
        waits = [place for place, _ in gpu.waits.elements()][before:]
        assert not any(place.startswith("engine/loss") for place in waits)
    assert pack([example], CPU, True).tree is None
