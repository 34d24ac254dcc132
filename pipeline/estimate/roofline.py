"""From matrix products and a device's figures to seconds of computing, by a roofline.

A product takes the longer of its FLOPs at the rate of large products and its bytes at the memory's
bandwidth, and a start on top, without which small products would look as efficient as large ones.

Source: Williams, Waterman and Patterson 2009 (roofline); Hockney 1983 (start).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.config.hardware import HardwareConfig, Precision
from pipeline.errors import ConfigError
from pipeline.estimate.products import MatrixProduct

BYTES_PER_VALUE = {"fp32": 4, "bf16": 2, "fp16": 2}

FUSED_BACKWARD = 1.25
"""FLOPs of fused attention's backward pass over the four products listed: the scores are computed
again, five products in all. Source: Dao et al. 2022, section 3.1."""

PLAIN_PASSES = 3.0
"""Times that a plain product of attention moves its operands: for itself, and for mask and softmax,
which read and write the scores between two products. Counted from the operations of one layer."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one rank's device reaches in one number format."""

    flops_per_second: float
    """Of large matrix products."""
    recurrent_flops_per_second: float
    """Of the products of recurrent steps."""
    attention_flops_per_second: float
    """Of fused attention."""
    memory_bytes_per_second: float
    cache_bytes: float
    call_seconds: float
    step_seconds: float
    """Of a step of a recurrence, at least."""
    bytes_per_value: int


@dataclass(frozen=True, kw_only=True)
class ComputeSeconds:
    """Seconds of one micro-batch's products, by what bounds them."""

    products: float = 0.0
    """Matrix products that a layer has at once."""
    attention: float = 0.0
    recurrence: float = 0.0
    """Steps of recurrences, whose products follow each other."""
    recurrence_floor: float = 0.0
    """The part of `recurrence` that no larger or faster device takes away: steps x latency."""
    num_calls: int = 0
    """Products outside of recurrences."""


def rates_of(hardware: HardwareConfig, precision: Precision, num_threads: int = 1) -> Rates:
    """Give what a rank reaches.

    Args:
        hardware: Figures of one device; with a CPU of one core.
        precision: Number format of products.
        num_threads: Cores of one rank; 1 for a GPU.

    Raises:
        ConfigError: The hardware states no peak for the number format.
    """
    if precision not in hardware.peak_flops_per_second:
        stated = ", ".join(hardware.peak_flops_per_second)
        raise ConfigError(
            f"hardware.peak_flops_per_second.{precision} is missing for {hardware.device}; stated: "
            f"{stated}. Look it up in the vendor's data sheet (dense), or set precision to one of "
            "these"
        )
    peak = hardware.peak_flops_per_second[precision] * num_threads
    return Rates(
        flops_per_second=peak * hardware.product_fraction,
        recurrent_flops_per_second=peak
        * (hardware.recurrent_fraction or hardware.product_fraction),
        attention_flops_per_second=peak * hardware.attention_fraction,
        memory_bytes_per_second=(
            hardware.memory_bytes_per_second * hardware.memory_fraction * num_threads
        ),
        cache_bytes=hardware.cache_bytes,
        call_seconds=hardware.call_seconds,
        step_seconds=hardware.recurrent_step_seconds,
        bytes_per_value=BYTES_PER_VALUE[precision],
    )


def compute_seconds(
    products: Iterable[MatrixProduct],
    rates: Rates,
    *,
    fused_attention: bool,
    skips_masked: bool = True,
) -> ComputeSeconds:
    """Add up the products of a micro-batch.

    Args:
        products: All of them.
        rates: Of the device.
        fused_attention: Whether one kernel computes scores, softmax and values.
        skips_masked: Whether that kernel leaves out the pairs that no query sees.
    """
    plain = attention = recurrence = floor = 0.0
    num_calls = 0
    for product in products:
        if product.sequential:
            recurrence += product.times * step_seconds(product, rates)
            floor += product.times * rates.step_seconds
            continue
        num_calls += product.times
        if is_attention(product):
            attention += attention_seconds(
                product, rates, fused=fused_attention, skips_masked=skips_masked
            )
        else:
            plain += product.times * product_seconds(product, rates)
    return ComputeSeconds(
        products=plain,
        attention=attention,
        recurrence=recurrence,
        recurrence_floor=floor,
        num_calls=num_calls,
    )


def is_attention(product: MatrixProduct) -> bool:
    """Tell whether a product is one of attention's, over pairs of positions."""
    return not product.sequential and (product.batch > 1 or product.needed_fraction < 1.0)


def product_seconds(product: MatrixProduct, rates: Rates) -> float:
    """Give the seconds of one call."""
    work = _flops(product) / rates.flops_per_second
    moved = _moved_bytes(product, rates) / rates.memory_bytes_per_second
    return max(work, moved) + rates.call_seconds


def step_seconds(product: MatrixProduct, rates: Rates) -> float:
    """Give the seconds of one step of a recurrence; its matrix stays in the cache if it fits."""
    work = _flops(product) / rates.recurrent_flops_per_second
    num_bytes = _moved_bytes(product, rates)
    is_cached = num_bytes <= rates.cache_bytes
    moved = 0.0 if is_cached else num_bytes / rates.memory_bytes_per_second
    return max(work, moved) + rates.step_seconds


def attention_seconds(
    product: MatrixProduct, rates: Rates, *, fused: bool, skips_masked: bool
) -> float:
    """Give the seconds of all calls of one of attention's products."""
    start = product.times * rates.call_seconds
    if fused:
        again = FUSED_BACKWARD if product.pass_ == "backward" else 1.0
        computed = product.needed_flops if skips_masked else product.flops
        return start + again * computed / rates.attention_flops_per_second
    work = _flops(product) / rates.flops_per_second
    moved = PLAIN_PASSES * _moved_bytes(product, rates) / rates.memory_bytes_per_second
    return start + product.times * max(work, moved)


def _flops(product: MatrixProduct) -> float:
    return product.flops / product.times


def _moved_bytes(product: MatrixProduct, rates: Rates) -> float:
    """Bytes that one call reads and writes, each operand once."""
    m, n, k = product.m, product.n, product.k
    return product.batch * (m * k + k * n + m * n) * rates.bytes_per_value
