"""The chunked loss against `F.cross_entropy` on all logits, in value, gradient and memory.

Shapes: `B` batch, `T` time, `N` all tokens, `D` model, `V` vocabulary.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config.batching import IGNORED_LABEL
from pipeline.config.gpt import GptConfig
from pipeline.models import build_model
from pipeline.models.loss import chunked_losses, default_chunk_tokens, token_losses

TOKENS, WIDTH, VOCAB = 37, 16, 50
CHUNKS = [1, 8, 37, 100]
"""Of one token, with a rest, of all tokens, and larger than all."""


def make_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Give hidden states, head and labels, every fifth ignored."""
    generator = torch.Generator().manual_seed(3)
    x_ND = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    head_VD = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels_N = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels_N[::5] = IGNORED_LABEL
    return x_ND, head_VD, labels_N


def reference(x_ND: Tensor, head_VD: Tensor, labels_N: Tensor, z_loss: float = 0.0) -> Tensor:
    """Give the losses by torch's own operation, z-loss added as written in the paper."""
    logits_NV = F.linear(x_ND, head_VD).float() if x_ND.dtype != torch.float64 else (
        F.linear(x_ND, head_VD)
    )  # fmt: skip
    losses_N = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED_LABEL, reduction="none")
    extra_N = z_loss * logits_NV.exp().sum(dim=1).log() ** 2
    return losses_N + extra_N.masked_fill(labels_N == IGNORED_LABEL, 0.0)


def gradients(losses_N: Tensor, weights: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((losses_N * weights).sum(), tensors)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_losses_and_gradients_equal_cross_entropy(chunk_tokens: int) -> None:
    x_ND, head_VD, labels_N = make_case()
    exact_N = reference(x_ND, head_VD, labels_N)
    losses_N = chunked_losses(x_ND, head_VD, labels_N, 0.0, chunk_tokens)
    torch.testing.assert_close(losses_N, exact_N, rtol=1e-6, atol=1e-6)
    assert torch.equal(losses_N[::5], torch.zeros(8))
    found = torch.autograd.grad(losses_N.sum() / 30, (x_ND, head_VD))
    expected = torch.autograd.grad(exact_N.sum() / 30, (x_ND, head_VD))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_losses_with_weights_of_their_own_have_the_gradient_of_the_weighted_sum(
    chunk_tokens: int,
) -> None:
    x_ND, head_VD, labels_N = make_case()
    weights_N = torch.linspace(-1.0, 2.0, TOKENS)
    losses_N = chunked_losses(x_ND, head_VD, labels_N, 0.0, chunk_tokens)
    found = gradients(losses_N, weights_N, x_ND, head_VD)
    expected = gradients(reference(x_ND, head_VD, labels_N), weights_N, x_ND, head_VD)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("reduce", [Tensor.sum, Tensor.mean, torch.atleast_1d])
def test_gradients_in_float64_equal_finite_differences(reduce: Any) -> None:
    x_ND, head_VD, labels_N = make_case(torch.float64)
    # Few of each, because every element of both is moved and scored anew.
    x_ND, head_VD = (part[:9, :4].detach().requires_grad_() for part in (x_ND, head_VD))
    labels_N = labels_N[:9] % 9
    labels_N[::5] = IGNORED_LABEL

    def losses(x_ND: Tensor, head_VD: Tensor) -> Tensor:
        result: Tensor = reduce(chunked_losses(x_ND, head_VD, labels_N, 0.0, 4))
        return result

    assert torch.autograd.gradcheck(losses, (x_ND, head_VD))


@pytest.mark.parametrize("weights", [1.0, torch.linspace(0.5, 2.0, TOKENS)], ids=["sum", "own"])
def test_z_loss_is_in_the_gradient_and_not_in_the_value(weights: Any) -> None:
    x_ND, head_VD, labels_N = make_case(torch.float64)
    losses_N = chunked_losses(x_ND, head_VD, labels_N, 0.1, 8)
    torch.testing.assert_close(losses_N, reference(x_ND, head_VD, labels_N))
    found = gradients(losses_N, weights, x_ND, head_VD)
    expected = gradients(reference(x_ND, head_VD, labels_N, 0.1), weights, x_ND, head_VD)
    torch.testing.assert_close(found, expected)
    without = gradients(reference(x_ND, head_VD, labels_N), weights, x_ND, head_VD)
    assert (found[1] - without[1]).abs().max() > 0.1


def test_losses_without_gradients_are_the_same() -> None:
    x_ND, head_VD, labels_N = make_case()
    with torch.no_grad():
        silent_N = chunked_losses(x_ND, head_VD, labels_N, 0.0, 8)
    assert torch.equal(silent_N, chunked_losses(x_ND, head_VD, labels_N, 0.0, 8).detach())


def test_bf16_losses_and_gradients_are_as_close_to_exact_as_bf16_is() -> None:
    x_ND, head_VD, labels_N = make_case(torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x_ND, head_VD)]
    exact_N = reference(*exact, labels_N)
    losses_N = chunked_losses(x_ND, head_VD, labels_N, 0.0, 8)
    assert losses_N.dtype == torch.float32
    # Logits reach 13 and bf16 keeps 8 bits of them.
    torch.testing.assert_close(losses_N.double(), exact_N, rtol=0.0, atol=0.05)
    found = torch.autograd.grad(losses_N.sum(), (x_ND, head_VD))
    expected = torch.autograd.grad(exact_N.sum(), exact)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs).norm() < 0.01 * theirs.norm()


def test_bf16_head_gradient_loses_nothing_by_more_chunks() -> None:
    x_ND, head_VD, labels_N = make_case(torch.bfloat16)
    whole, pieces = (
        torch.autograd.grad(chunked_losses(x_ND, head_VD, labels_N, 0.0, size).sum(), head_VD)[0]
        for size in (TOKENS, 1)
    )
    # One rounding of the sum, not one a chunk.
    torch.testing.assert_close(pieces, whole, rtol=2**-7, atol=2**-9)


def test_a_sum_beyond_fp16_is_scaled_before_it_is_stored() -> None:
    """4000 equal tokens of size 32 pull at one row by 126,000; fp16 ends at 65,504."""
    x_ND = torch.full((4000, 4), 32.0, dtype=torch.float16)
    head_VD = torch.zeros(64, 4, dtype=torch.float16, requires_grad=True)
    labels_N = torch.zeros(4000, dtype=torch.long)
    losses_N = chunked_losses(x_ND, head_VD, labels_N, 0.0, 100)
    (found,) = torch.autograd.grad(losses_N.sum() / 4000, head_VD)
    assert found.dtype == torch.float16
    # Softmax is even, so the gradient is x / V, and x / V - x for the label.
    expected = torch.full((64, 4), 0.5)
    expected[0] -= 32.0
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=0.0)


def test_logits_that_are_not_finite_give_a_loss_that_is_not() -> None:
    x_ND, head_VD, labels_N = make_case()
    with torch.no_grad():
        x_ND[1, 0] = torch.inf
    losses_N = chunked_losses(x_ND, head_VD, labels_N, 0.0, 8)
    assert losses_N.isfinite().tolist() == [index != 1 for index in range(TOKENS)]


@pytest.mark.parametrize("tied_head", [True, False])
def test_a_model_has_the_gradients_of_its_full_logits(tied_head: bool) -> None:
    config = GptConfig(
        width=16, depth=1, heads=2, max_positions=12, tied_head=tied_head, z_loss=1e-3
    )
    model = build_model(config, VOCAB, seed=0)
    tokens = torch.randint(VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))
    labels_BT = tokens[:, 1:].clone()
    labels_BT[1, :5] = IGNORED_LABEL
    names = [name for name, _ in model.named_parameters()]
    assert ("head_VD" in names) is not tied_head
    parameters = list(model.parameters())
    found = torch.autograd.grad(model(tokens[:, :-1], labels_BT).sum(), parameters)
    logits_NV = model.logits(tokens[:, :-1]).flatten(0, 1)
    identity_VV = torch.eye(VOCAB)
    exact_N = reference(logits_NV, identity_VV, labels_BT.flatten(), 1e-3)
    expected = torch.autograd.grad(exact_N.sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_chunk_is_small_in_logits_and_not_in_tokens() -> None:
    cpu = torch.device("cpu")
    assert default_chunk_tokens(4096, cpu) == 1024
    assert default_chunk_tokens(256, cpu) == 16384
    assert default_chunk_tokens(50_257, cpu) == 256


MEMORY = """
import torch
from pipeline.models.loss import chunked_losses
from pipeline.training.device import peak_memory, reset_peak_memory

cpu = torch.device("cpu")
x_ND = torch.randn(2048, 32, requires_grad=True)
head_VD = torch.randn(16384, 32, requires_grad=True)
labels_N = torch.randint(16384, (2048,))
for chunk_tokens in (8, 128, 512, 2048):
    before = reset_peak_memory(cpu)
    chunked_losses(x_ND, head_VD, labels_N, 0.0, chunk_tokens).sum().backward()
    print(int(peak_memory(cpu)["memory/peak_bytes"]) - before)
"""


def test_peak_memory_falls_as_the_chunk_does() -> None:
    """Two tensors of a chunk stand at a time; all logits in float32 are 128 MiB."""
    logits_bytes = 2048 * 16384 * 4
    command = [sys.executable, "-c", MEMORY]
    # Blocks above 64 KiB go back to the system when freed, so that no gap of the heap counts.
    surroundings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings)
    _, small, middle, large = map(int, done.stdout.split())
    assert large == pytest.approx(2 * logits_bytes, rel=0.1)
    # Gradients of the head, summed and added up, take 2 MiB each.
    assert middle < 2.1 * logits_bytes / 4 + 8 * 2**20
    assert small < 2.1 * logits_bytes / 16 + 8 * 2**20


@pytest.mark.gpu
def test_bf16_on_cuda_equals_cross_entropy_and_holds_no_logits() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x_1ND = torch.randn(1, 16384, 256, device="cuda", generator=generator).bfloat16()
    head_VD = torch.randn(32768, 256, device="cuda", generator=generator).bfloat16() * 0.05
    x_1ND.requires_grad_(), head_VD.requires_grad_()
    labels_1N = torch.randint(32768, (1, 16384), device="cuda", generator=generator)
    labels_1N[0, ::7] = IGNORED_LABEL
    token_losses(x_1ND[:, :16], head_VD, labels_1N[:, :16], 0.0).sum().backward()
    torch.cuda.reset_peak_memory_stats()
    standing = torch.cuda.memory_allocated()
    losses_1N = token_losses(x_1ND, head_VD, labels_1N, 0.0)
    found = torch.autograd.grad(losses_1N.sum(), (x_1ND, head_VD))
    assert torch.cuda.max_memory_allocated() - standing < 16384 * 32768 * 4
    exact_N = reference(x_1ND[0], head_VD, labels_1N[0])
    torch.testing.assert_close(losses_1N[0], exact_N, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(exact_N.sum(), (x_1ND, head_VD))
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.float() - theirs.float()).norm() < 0.01 * theirs.float().norm()
