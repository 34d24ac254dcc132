"""Times the chunked loss, forward and backward, beside `F.cross_entropy` on all logits.

    python -m tests.bench.loss_peers --threads 2 --dtype float32 > loss.json

Both arms start from the same hidden states and head, and end with the gradients of both.
"""

import argparse
import json

import torch
from torch.nn import functional as F

from pipeline.models.loss import default_chunk_tokens, token_losses
from tests.bench.interleaved import ratios, summarise, time_rounds
from tests.bench.timing import cpu_model


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    x_1ND = torch.randn(1, options.tokens, options.width, generator=generator).to(dtype)
    head_VD = (0.02 * torch.randn(options.vocab, options.width, generator=generator)).to(dtype)
    labels_1N = torch.randint(options.vocab, (1, options.tokens), generator=generator)
    x_1ND.requires_grad_()
    head_VD.requires_grad_()

    def full() -> None:
        logits_NV = F.linear(x_1ND, head_VD).float().flatten(0, 1)
        losses_N = F.cross_entropy(logits_NV, labels_1N.flatten(), reduction="none")
        torch.autograd.grad(losses_N.sum() / options.tokens, (x_1ND, head_VD))

    def chunked() -> None:
        losses_1N = token_losses(x_1ND, head_VD, labels_1N, 0.0)
        torch.autograd.grad(losses_1N.sum() / options.tokens, (x_1ND, head_VD))

    seconds, cpu_seconds = time_rounds({"cross_entropy": full, "chunked": chunked}, options.rounds)
    report = {
        "cpu": cpu_model(),
        "torch": torch.__version__,
        **vars(options),
        "chunk_tokens": default_chunk_tokens(options.vocab, torch.device("cpu")),
        "seconds": {name: summarise(values) for name, values in seconds.items()},
        "cpu_seconds": {name: summarise(values) for name, values in cpu_seconds.items()},
        "chunked_over_cross_entropy": ratios(seconds, "chunked", "cross_entropy"),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
