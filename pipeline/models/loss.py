"""From hidden states, head and labels to the loss of each token.

Shapes: `B` batch, `T` time, `D` model, `V` vocabulary.
"""

from torch import Tensor
from torch.nn import functional as F

from pipeline.config.batching import IGNORED_LABEL


def token_losses(x_BTD: Tensor, head_VD: Tensor, labels_BT: Tensor, z_loss: float) -> Tensor:
    """Give the negative log-likelihood of every label.

    The softmax runs in float32 whatever the type of the logits: the 8 bits of bf16 are fewer than
    a loss needs.

    Args:
        x_BTD: Normalised hidden states, any float type.
        head_VD: Matrix to logits, in the same type.
        labels_BT: Token ids, `IGNORED_LABEL` where nothing is to be predicted.
        z_loss: Weight of the squared logarithm of the softmax's denominator, which is part of the
            gradient and not of the value.

    Returns:
        float32 `[B, T]` in nats, 0 where the label is ignored.

    Source: Chowdhery et al. 2022, section 5 (z-loss).
    """
    logits_NV = F.linear(x_BTD, head_VD).float().flatten(0, 1)
    labels_N = labels_BT.flatten()
    losses_N = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED_LABEL, reduction="none")
    if z_loss > 0.0:
        extra_N = z_loss * logits_NV.logsumexp(dim=1).square()
        extra_N = extra_N.masked_fill(labels_N == IGNORED_LABEL, 0.0)
        losses_N = losses_N + (extra_N - extra_N.detach())
    return losses_N.view(labels_BT.shape)
