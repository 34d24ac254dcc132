"""From logits and labels to the loss of each token.

Shapes: `B` batch, `T` time, `V` vocabulary.
"""

from torch import Tensor
from torch.nn import functional as F

from pipeline.config.batching import IGNORED_LABEL


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Give the negative log-likelihood of every label.

    The softmax runs in float32 whatever the type of the logits: the 8 bits of bf16 are fewer than
    a loss needs.

    Args:
        logits_BTV: Unnormalised log-probabilities, any float type.
        labels_BT: Token ids, `IGNORED_LABEL` where nothing is to be predicted.

    Returns:
        float32 `[B, T]` in nats, 0 where the label is ignored.
    """
    losses_N = F.cross_entropy(
        logits_BTV.float().flatten(0, 1),
        labels_BT.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    )
    return losses_N.view(labels_BT.shape)
