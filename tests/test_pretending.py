"""The pretended GPU itself: what it sees, what it refuses, and that it leaves nothing behind."""

import gc

import pytest
import torch
import torch.nn.functional as F
from making.pretended_gpu import DeviceMix, PretendedGpu
from torch.utils.checkpoint import checkpoint

CPU = torch.device("cpu")


def reasons(gpu):
    return sorted(reason for _, reason in gpu.waits)


def test_tensors_are_where_they_were_put():
    with PretendedGpu() as gpu:
        x = torch.ones(3, device="cuda")
        assert x.device == torch.device("cuda", 0)
        assert x.is_cuda
        assert not x.is_cpu
        assert (x + 1)[1:].view(2, 1).device.type == "cuda"
        assert x.cpu().device == CPU
        assert torch.ones(3).to("cuda", torch.float16).device.type == "cuda"
        assert torch.ones(3).device == CPU
        assert torch.nn.Linear(2, 2).to(0).weight.device.type == "cuda"
        assert torch.nn.Linear(2, 2).to(device="cuda").weight.device.type == "cuda"
        assert torch.empty(2, device="meta").device.type == "meta"
    assert gpu.mixes == []
    assert torch.ones(3).device == CPU
    assert not torch.cuda.is_available()


def test_two_devices_are_refused_forward_and_backward():
    with PretendedGpu():
        with pytest.raises(DeviceMix, match="Expected all tensors to be on the same device"):
            torch.ones(3, device="cuda") + torch.ones(3)
        assert (torch.ones(3, device="cuda") + torch.tensor(2.0)).device.type == "cuda"  # CUDA takes numbers of the CPU

        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return grad * torch.ones(3)

        with pytest.raises(DeviceMix, match="mul"):
            Wrong.apply(torch.ones(3, device="cuda", requires_grad=True)).sum().backward()


def test_without_strictness_mixes_are_only_listed():
    with PretendedGpu(strict=False) as gpu:
        torch.ones(3, device="cuda") + torch.ones(3)
        torch.ones(3, device="cuda") * torch.ones(3)
    assert len(gpu.mixes) == 2


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: bool(x.any()), "_local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "copy from the GPU"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index by a mask"),
        (lambda x: x[torch.tensor([0])], "index of the CPU into a tensor of the GPU"),
        (lambda x: torch.tensor([1], device="cuda"), "copy to the GPU"),
        (lambda x: torch.ones(3).to("cuda"), "copy to the GPU"),
        (lambda x: torch.ones(3).to("cuda", non_blocking=True), "copy from pageable memory"),
        (lambda x: x.copy_(torch.ones(3)), "copy to the GPU"),
        (lambda x: torch.cuda.synchronize(), "synchronize"),
        (lambda x: torch.cuda.current_stream().synchronize(), "Stream.synchronize"),
    ],
)
def test_a_wait_is_seen(work, reason):
    with PretendedGpu() as gpu:
        x = torch.ones(3, device="cuda")
        gpu.waits.clear()
        work(x)
    assert reason in reasons(gpu)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum() * 2,
        lambda x: x[1:],
        lambda x: torch.where(x > 0, x, -x),
        lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
        lambda x: torch.ones(3, pin_memory=True).to("cuda", non_blocking=True),
        lambda x: x.copy_(torch.ones(3).pin_memory(), non_blocking=True),
        lambda x: torch.zeros(3, device="cuda"),
        lambda x: torch.nn.utils.get_total_norm([x, x.clone()]),
    ],
)
def test_no_wait_is_seen_where_there_is_none(work):
    with PretendedGpu() as gpu:
        x = torch.ones(3, device="cuda")
        gpu.waits.clear()
        work(x)
    assert reasons(gpu) == []


def test_kernels_are_counted_and_views_are_not():
    with PretendedGpu() as gpu:
        x = torch.ones(4, 4, device="cuda")
        gpu.launches.clear()
        (x.view(16)[2:] + 1).mul_(2)
    assert dict(gpu.launches) == {"add": 1, "mul_": 1}


def test_memory_is_that_of_the_tensors():
    with PretendedGpu() as gpu:
        x = torch.empty(2**20, device="cuda")
        y = x[1:].view(-1)
        assert torch.cuda.memory_allocated() == gpu.live == 4 * 2**20
        z = x + 1
        del z
        assert gpu.live == 4 * 2**20
        assert torch.cuda.max_memory_allocated() == 8 * 2**20
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == 4 * 2**20
        assert torch.cuda.mem_get_info() == (8 * 2**30 - 4 * 2**20, 8 * 2**30)
        del x, y
        gc.collect()
        assert gpu.live == 0
        torch.empty(1, device="cuda")
        assert gpu.peak == 4 * 2**20


def test_a_full_gpu_says_so_in_the_words_of_cuda():
    with PretendedGpu(gib=1 / 64) as gpu:
        x = torch.empty(2**21, device="cuda")
        with pytest.raises(torch.OutOfMemoryError) as error:
            torch.empty(2**21 + 1, device="cuda")
        message = str(error.value)
        assert message.startswith(
            "CUDA out of memory. Tried to allocate 8.00 MiB. GPU 0 has a total capacity of 16.00 MiB of which 8.00 MiB "
            "is free. "
        )
        assert gpu.live == 2**23
        y = x + 1  # the other half
        with pytest.raises(torch.OutOfMemoryError):
            y + 1
        del y
        assert (x + 1).device.type == "cuda"


def test_a_fraction_of_the_memory_may_be_used():
    with PretendedGpu(gib=1 / 64) as gpu:
        torch.cuda.set_per_process_memory_fraction(0.25)
        torch.empty(2**20, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match=r"4\.00 MiB allowed; "):
            torch.empty(2**20 + 1, device="cuda")
        torch.cuda.empty_cache()
    assert gpu.calls["set_per_process_memory_fraction", "0.25"] == 1
    assert gpu.calls["empty_cache", ""] == 1


def test_name_memory_and_capability_are_those_asked_for():
    with PretendedGpu(gib=6, capability=(7, 5), name="NVIDIA GeForce RTX 2060", has_flash=False):
        properties = torch.cuda.get_device_properties(0)
        assert (properties.name, properties.total_memory, properties.major) == ("NVIDIA GeForce RTX 2060", 6 * 2**30, 7)
        assert torch.cuda.get_device_name() == "NVIDIA GeForce RTX 2060"
        assert torch.cuda.get_device_capability() == (7, 5)
        assert torch.cuda.is_bf16_supported()
        assert not torch.cuda.is_bf16_supported(including_emulation=False)
        assert not torch.backends.cuda.is_flash_attention_available()
    with PretendedGpu():
        assert torch.cuda.is_bf16_supported(including_emulation=False)
        assert torch.backends.cuda.is_flash_attention_available()


def test_the_gpu_has_random_numbers_of_its_own():
    with PretendedGpu():
        torch.manual_seed(1)
        on_cpu, on_gpu = torch.get_rng_state(), torch.cuda.get_rng_state()
        first = torch.rand(4, device="cuda")
        assert torch.equal(torch.get_rng_state(), on_cpu)
        assert not torch.equal(torch.cuda.get_rng_state(), on_gpu)
        torch.cuda.set_rng_state(on_gpu)
        assert torch.rand(4, device="cuda").cpu().equal(first.cpu())
        torch.cuda.set_rng_state(on_gpu)
        assert torch.empty(4, device="cuda").uniform_().cpu().equal(first.cpu())
        with pytest.raises(RuntimeError, match="generator"):
            first.uniform_(generator=torch.Generator())


def test_checkpointing_draws_the_same_dropout_again():
    grads = []
    for again in (False, True):
        with PretendedGpu():
            torch.manual_seed(1)
            x = torch.ones(64, device="cuda", requires_grad=True)
            out = checkpoint(F.dropout, x, use_reentrant=False) if again else F.dropout(x)
            out.sum().backward()
            grads.append(x.grad.cpu())
    assert 0 < grads[0].count_nonzero() < 64
    assert grads[0].equal(grads[1])


# --- kernels that only CUDA has ---------------------------------------------------------------------------------------

HEADS, GROUPS, SIZE = 4, 2, 8
LENGTHS = [(5, 5), (33, 33), (1, 1)]


def attention(q, k, v, lengths, causal):
    """The output by softmax, sequence by sequence."""
    outs, start, place = [], 0, 0
    for rows, sources in lengths:
        parts = q[start : start + rows], k[place : place + sources], v[place : place + sources]
        parts = [x.transpose(0, 1)[None] for x in parts]
        out = F.scaled_dot_product_attention(*parts, is_causal=causal, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
        start, place = start + rows, place + sources
    return torch.cat(outs)


def sums(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to("cuda")


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_cuda_means_what_it_does(kernel, causal):
    lengths = LENGTHS if causal else [(5, 3), (33, 60), (1, 7)]
    dtype = torch.bfloat16 if kernel == "flash" else torch.float32
    rows, sources = (sum(pair[i] for pair in lengths) for i in range(2))
    most = [max(pair[i] for pair in lengths) for i in range(2)]
    torch.manual_seed(0)
    q, grad = (torch.randn(rows, HEADS, SIZE).to(dtype) for _ in range(2))
    k, v = (torch.randn(sources, GROUPS if kernel == "flash" else HEADS, SIZE).to(dtype) for _ in range(2))
    wanted = [x.float().requires_grad_() for x in (q, k, v)]
    right = attention(*wanted, lengths, causal)
    grads = torch.autograd.grad(right, wanted, grad.float())
    with PretendedGpu() as gpu:
        q, k, v, grad = (x.to("cuda") for x in (q, k, v, grad))
        places = sums([pair[0] for pair in lengths]), sums([pair[1] for pair in lengths])
        before = sum(gpu.launches.values())
        if kernel == "flash":
            out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
                q, k, v, *places, *most, 0.0, causal, False
            )
            back = torch.ops.aten._flash_attention_backward(
                grad, q, k, v, out, lse, *places, *most, 0.0, causal, rng, unused
            )
            assert lse.shape == (HEADS, rows)
        else:
            one = [x[None] for x in (q, k, v)]
            out, lse, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
                *one, None, *places, *most, 0.0, int(causal), True
            )
            *back, _ = torch.ops.aten._efficient_attention_backward(
                grad[None], *one, None, out, *places, *most, lse, 0.0, seed, offset, int(causal), False
            )
            out, back = out[0], [x[0] for x in back]
            assert lse.shape == (len(lengths), HEADS, -(-most[0] // 32) * 32)
        assert out.device.type == lse.device.type == "cuda"
        assert sum(gpu.launches.values()) - before == 2
        results = [x.cpu().float() for x in (out, *back)]
    for result, expected in zip(results, (right, *grads), strict=True):
        assert (result - expected).norm() <= (2e-2 if kernel == "flash" else 1e-6) * expected.norm()


def test_flash_attention_is_refused_where_cuda_refuses_it():
    def call(dtype):
        q = torch.zeros(4, HEADS, SIZE, dtype=dtype, device="cuda")
        torch.ops.aten._flash_attention_forward(q, q, q, sums([4]), sums([4]), 4, 4, 0.0, True, False)

    with PretendedGpu():
        call(torch.float16)
        with pytest.raises(RuntimeError, match="fp16 and bf16"):
            call(torch.float32)
    with PretendedGpu(capability=(7, 5)), pytest.raises(RuntimeError, match="Ampere"):
        call(torch.float16)
    with PretendedGpu(has_flash=False), pytest.raises(RuntimeError, match="not enabled"):
        call(torch.float16)


def test_the_fused_norm_of_cuda_means_what_it_does():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    right = F.rms_norm(x, (16,), weight, 1e-6)
    grad = torch.randn(6, 16)
    grads = torch.autograd.grad(right, (x, weight), grad)
    with PretendedGpu() as gpu, torch.no_grad():
        there = [value.detach().to("cuda") for value in (x, weight, grad)]
        gpu.launches.clear()
        out, scale = torch.ops.aten._fused_rms_norm(there[0], [16], there[1], 1e-6)
        back = torch.ops.aten._fused_rms_norm_backward(there[2], there[0], [16], scale, there[1], [True, True])
        assert sum(gpu.launches.values()) == 2
        results = [value.cpu() for value in (out, *back)]
    for result, expected in zip(results, (right, *grads), strict=True):
        assert torch.allclose(result, expected, atol=1e-5)
