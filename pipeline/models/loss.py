"""From hidden states, head and labels to the loss of each token, a chunk of tokens at a time.

The logits of all tokens are the largest tensor of a language model, and its loss needs them three
times over: logits, softmax and gradient. Here they exist for one chunk only. The gradients are
computed in the forward pass, while a chunk's softmax is at hand: computing the logits again in the
backward pass took 1.35 times as long, and the full logits 1.45 times (2048 tokens, width 256,
V = 4096, fp32, one thread, chunks of 256). So the head's backward pass counts as forward time.

Shapes: `B` batch, `T` time, `N` all B x T tokens, `C` tokens of a chunk, `D` model, `V` vocabulary.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.config.batching import IGNORED_LABEL
from pipeline.config.chunks import head_chunk_tokens


def token_losses(x_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor, z_loss: float) -> Tensor:
    """Give the negative log-likelihood of every label.

    The softmax runs in float32 whatever the type of the logits: the 8 bits of bf16 are fewer than
    a loss needs.

    Args:
        x_BTD: Normalised hidden states, any float type.
        head_VD: Matrix to logits, in the same type.
        labels_BT: Token ids, `IGNORED_LABEL` where nothing is to be predicted.
        z_loss: Weight of the squared logarithm of the softmax's denominator. It is part of the
            gradient and not of the value, so that losses with and without it compare.

    Returns:
        float32 `[B, T]` in nats, 0 where the label is ignored.

    Source: Chowdhery et al. 2022, section 5 (z-loss).
    """
    chunk_tokens = default_chunk_tokens(head_VD.shape[0], x_BTD.device)
    losses_N = chunked_losses(
        x_BTD.flatten(0, 1), head_VD, labels_BT.flatten(), z_loss, chunk_tokens
    )
    return losses_N.view(labels_BT.shape)


def default_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Give the tokens of a chunk on a device."""
    return head_chunk_tokens(vocab_size, "cuda" if device.type == "cuda" else "cpu")


def chunked_losses(
    x_ND: Tensor, head_VD: Tensor, labels_N: Tensor, z_loss: float, chunk_tokens: int
) -> Tensor:
    """Give the losses `[N]` of `token_losses` in chunks of a stated size.

    Args:
        x_ND: Normalised hidden states.
        head_VD: Matrix to logits.
        labels_N: Token ids or `IGNORED_LABEL`.
        z_loss: Weight of the z-loss in the gradient.
        chunk_tokens: Tokens whose logits exist at a time.
    """
    if torch.is_grad_enabled():
        losses_N = _HeadLoss.apply(x_ND, head_VD, labels_N, z_loss, chunk_tokens)  # type: ignore[no-untyped-call]
        return cast("Tensor", losses_N)
    head = _Head(head_VD)
    chunks = _chunks(chunk_tokens, x_ND, labels_N)
    return torch.cat([head.softmax(x_CD, labels_C)[0] for x_CD, labels_C in chunks])


class _Head:
    """The head in the types it computes in."""

    def __init__(self, head_VD: Tensor) -> None:
        self.product_dtype = _product_dtype(head_VD)
        self.softmax_dtype = torch.promote_types(head_VD.dtype, torch.float32)
        self.weight_VD = head_VD.to(self.product_dtype)

    def softmax(self, x_CD: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give losses `[C]`, probabilities `[C, V]` and the logarithm of their denominator `[C]`.

        The largest probability is one over the denominator, so one softmax gives all three.
        """
        logits_CV = x_CD.to(self.product_dtype) @ self.weight_VD.T
        logits_CV = logits_CV.to(self.softmax_dtype)
        labels_C1 = labels_C.clamp(min=0).unsqueeze(1)
        chosen_C = logits_CV.gather(1, labels_C1).squeeze(1)
        largest_C = logits_CV.amax(dim=1)
        probabilities_CV = logits_CV.softmax(dim=1)
        log_sums_C = largest_C - probabilities_CV.amax(dim=1).log()
        losses_C = (log_sums_C - chosen_C).masked_fill(labels_C == IGNORED_LABEL, 0.0)
        return losses_C, probabilities_CV, log_sums_C

    def add_gradients(
        self,
        x_CD: Tensor,
        labels_C: Tensor,
        weights_C: Tensor,
        z_loss: float,
        head_grad_VD: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Give losses `[C]` and the gradient of `x_CD`; add that of the head to `head_grad_VD`.

        Weights go to the narrow side of the products, not over all logits.
        """
        losses_C, grad_CV, log_sums_C = self.softmax(x_CD, labels_C)
        if z_loss > 0.0:
            grad_CV *= (1 + 2 * z_loss * log_sums_C).unsqueeze(1)
        labels_C1 = labels_C.clamp(min=0).unsqueeze(1)
        grad_CV.scatter_add_(1, labels_C1, grad_CV.new_full((1, 1), -1.0).expand_as(labels_C1))
        grad_CV = grad_CV.to(self.product_dtype)
        weights_C1 = weights_C.unsqueeze(1).to(self.softmax_dtype)
        weighted_CD = (x_CD * weights_C1).to(self.product_dtype)
        if self.product_dtype == self.softmax_dtype:
            torch.addmm(head_grad_VD, grad_CV.T, weighted_CD, out=head_grad_VD)
        else:
            head_grad_VD += grad_CV.T @ weighted_CD
        return losses_C, ((grad_CV @ self.weight_VD) * weights_C1).to(x_CD.dtype)


def _product_dtype(head_VD: Tensor) -> torch.dtype:
    """Give the type of the products: the head's own, where the device computes in it.

    A CPU without the instructions emulates bf16: 20 times slower than float32 (2048 tokens, width
    256, V = 4096, AVX2).
    """
    if head_VD.dtype == torch.bfloat16 and head_VD.device.type == "cpu":
        has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return head_VD.dtype


class _HeadLoss(torch.autograd.Function):
    """Losses whose gradients are computed with them, for equal weights of all losses.

    Training sums the losses and scales the sum, so that autograd hands back one number for all of
    them, as a tensor without strides. For any other gradient the chunks are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, labels_N: Tensor, z_loss: float, chunk_tokens: int
    ) -> Tensor:
        losses_N, x_grad_ND, head_grad_VD = _losses_and_gradients(
            x_ND, head_VD, labels_N, z_loss, chunk_tokens, (labels_N != IGNORED_LABEL)
        )
        ctx.save_for_backward(x_ND, head_VD, labels_N, x_grad_ND, head_grad_VD)
        ctx.z_loss, ctx.chunk_tokens = z_loss, chunk_tokens
        return losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, head_VD, labels_N, x_grad_ND, head_grad_VD = ctx.saved_tensors
        if grad_N.stride() == (0,):
            factor = grad_N[0]
            head_grad_VD = (head_grad_VD * factor).to(head_VD.dtype)
            return x_grad_ND * factor, head_grad_VD, None, None, None
        weights_N = grad_N.masked_fill(labels_N == IGNORED_LABEL, 0.0)
        _, x_grad_ND, head_grad_VD = _losses_and_gradients(
            x_ND, head_VD, labels_N, ctx.z_loss, ctx.chunk_tokens, weights_N
        )
        return x_grad_ND, head_grad_VD.to(head_VD.dtype), None, None, None


def _losses_and_gradients(
    x_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    z_loss: float,
    chunk_tokens: int,
    weights_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the losses and the gradients of their weighted sum, z-loss included.

    Args:
        x_ND: Normalised hidden states.
        head_VD: Matrix to logits.
        labels_N: Token ids or `IGNORED_LABEL`.
        z_loss: Weight of the z-loss in the gradient.
        chunk_tokens: Tokens whose logits exist at a time.
        weights_N: Weight of each loss in the sum.

    Returns:
        Losses `[N]`, and the gradients of `x_ND` and `head_VD` in their types; that of a head in
        fp16 in float32, because a sum over tokens leaves the range of fp16 until it is scaled.
    """
    head = _Head(head_VD)
    losses, x_grads = [], []
    # The sum over chunks keeps its small terms only in float32.
    head_grad_VD = torch.zeros_like(head_VD, dtype=head.softmax_dtype)
    for x_CD, labels_C, weights_C in _chunks(chunk_tokens, x_ND, labels_N, weights_N):
        losses_C, grad_CD = head.add_gradients(x_CD, labels_C, weights_C, z_loss, head_grad_VD)
        losses.append(losses_C)
        x_grads.append(grad_CD)
    kept_dtype = torch.float32 if head_VD.dtype == torch.float16 else head_VD.dtype
    return torch.cat(losses), torch.cat(x_grads), head_grad_VD.to(kept_dtype)


def _chunks(chunk_tokens: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for begin in range(0, len(tensors[0]), chunk_tokens):
        yield tuple(tensor[begin : begin + chunk_tokens] for tensor in tensors)
