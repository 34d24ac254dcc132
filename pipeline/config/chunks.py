"""How much of a large tensor exists at a time: logits of the head, pairs of additive attention."""

from typing import Literal

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26}
"""Logits of one chunk by device. On a CPU 16 MiB of float32: with one thread 2^20 took 0.85 of its
time, but every chunk waits for all threads a dozen times, and with two threads on a busy machine
2^20 took 2.4 times as long. A GPU needs large products to be busy: 256 MiB, not measured."""

SMALLEST_CHUNK_TOKENS = 256
"""A chunk below it would spend more on adding up the head's gradient, once a chunk, than it saves:
at V = 50,000 a chunk of 2^22 logits has 83 tokens."""

MAX_PLAIN_KEYS = 512
"""Longest attention that a CPU computes in bf16 by plain products. With 256 keys, 8 samples and 4
heads of 64 on 2 AVX-512 cores a layer took 13 ms so, compiled, and 26 ms in torch's fused kernel;
plain products keep T x S scores, so longer ones stay with the kernel, which keeps none. In float32
the kernel is the faster one from the start: 19 ms against 23 ms on 2 AVX2 cores."""

PIECE_ELEMENTS = 1 << 24
"""Largest number of sums q + k that additive attention holds at a time: 64 MiB in float32."""


def head_chunk_tokens(vocab_size: int, device_type: Literal["cpu", "cuda"]) -> int:
    """Give the tokens whose logits exist at a time; see `CHUNK_LOGITS`.

    Args:
        vocab_size: Rows V of the head.
        device_type: What computes.
    """
    return max(SMALLEST_CHUNK_TOKENS, CHUNK_LOGITS[device_type] // vocab_size)


def piece_queries(num_samples: int, num_keys: int, width: int) -> int:
    """Give the queries of which additive attention holds all pairs at a time.

    Args:
        num_samples: Samples B.
        num_keys: Keys of each.
        width: Width d of a sum.
    """
    return max(1, PIECE_ELEMENTS // (num_samples * num_keys * width))
