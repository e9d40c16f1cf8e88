"""Gated DeltaNet over a tree: what transformers computes token by token along each path, however the nodes are cut."""

import pytest
import torch
from making.packs import CPU
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from persona.engine.packing import Tree
from persona.engine.recurrent import CHUNK, _convolution, _cut, _delta_rule

KEY_HEADS, HEADS, SIZE, WIDTH = 2, 4, 16, 24
# stretches of a tree: ancestors, begin, end
STEM = (range(0), 0, 150)
TREES = {
    "a stem": [STEM],
    "two branches": [STEM, (range(150), 150, 157), (range(150), 157, 260)],
    "a branch of a branch": [STEM, (range(150), 150, 180), ([*range(150), *range(150, 170)], 180, 300)],
    "a branch inside the stem": [STEM, (range(70), 150, 290), (range(1), 290, 291)],
    "nothing in common": [(range(0), 0, 64), (range(0), 64, 130), (range(0), 130, 131)],
}


def paths(segments):
    """The tokens of each example: a stretch with its ancestors."""
    return [[*ancestors, *range(begin, end)] for ancestors, begin, end in segments]


def assert_close(found, wanted, limit=1e-5):
    assert float((found - wanted).detach().norm()) <= limit * float(wanted.detach().norm())


@pytest.mark.parametrize("strongest", [0.1, 20.0])
@pytest.mark.parametrize("tree", TREES)
def test_each_path_has_the_state_of_its_own_tokens(tree, strongest):
    segments = TREES[tree]
    tokens = segments[-1][2]
    torch.manual_seed(0)
    sizes = ((KEY_HEADS, SIZE), (KEY_HEADS, SIZE), (HEADS, WIDTH))
    parts = [torch.randn(1, tokens, *size, requires_grad=True) for size in sizes]
    decay = (-strongest * torch.rand(1, tokens, HEADS)).requires_grad_()
    rate = torch.rand(1, tokens, HEADS, requires_grad=True)
    weights = torch.randn(1, tokens, HEADS, WIDTH)
    leaves = [*parts, decay, rate]

    found, state = _delta_rule(*parts, g=decay, beta=rate, tree=Tree(segments, CPU))
    assert state is None
    ours = torch.autograd.grad((found * weights).sum(), leaves)

    wanted, right = torch.zeros_like(found), [torch.zeros_like(leaf) for leaf in leaves]
    for path, (_, begin, end) in zip(paths(segments), segments, strict=True):
        along = [leaf[:, path] for leaf in leaves]
        out, _ = qwen3_next.torch_recurrent_gated_delta_rule(
            *along[:3], g=along[3], beta=along[4], use_qk_l2norm_in_kernel=True
        )
        own = out[:, begin - end :]
        wanted[:, begin:end] = own.detach()
        for total, gradient in zip(
            right, torch.autograd.grad((own * weights[:, begin:end]).sum(), leaves), strict=True
        ):
            total += gradient
    assert_close(found, wanted)
    for gradient, total in zip(ours, right, strict=True):
        assert_close(gradient, total)


@pytest.mark.parametrize("kernel", [1, 3, 4])
@pytest.mark.parametrize("tree", TREES)
def test_a_convolution_sees_the_ancestors(tree, kernel):
    segments = TREES[tree]
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 5, segments[-1][2]), torch.randn(5, kernel), torch.randn(5)
    found = _convolution(x, weight, bias, "silu", tree=Tree(segments, CPU))
    for path, (_, begin, end) in zip(paths(segments), segments, strict=True):
        wanted = qwen3_next.causal_conv1d_fn(x[..., path], weight, bias, "silu")
        torch.testing.assert_close(found[..., begin:end], wanted[..., begin - end :])


def test_chunks_of_one_level_are_computed_together():
    """As many steps as the longest path has chunks, not as the tree has."""
    segments = [(range(0), 0, CHUNK), *((range(CHUNK), begin, begin + 9) for begin in range(CHUNK, CHUNK + 90, 9))]
    assert [len(level) for level in _cut(Tree(segments, CPU)).above] == [1, 10]
