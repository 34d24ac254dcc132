"""Published training throughputs as runs of ours, each with the page that it was read from.

Left out are rows that no run of ours can be: tensor or pipeline parallelism, fp8, heads whose
width is not d / heads (Languini mini and XL), and Languini's quasi-LSTM, whose gates do not see the
state.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from pipeline.config.hardware import HardwareConfig
from pipeline.config.load import load_cluster
from pipeline.config.schema import RunConfig
from pipeline.estimate.step_time import StepTime, execution_of, step_time

CLUSTERS = Path(__file__).resolve().parents[2] / "configs" / "cluster"

FOUNDRY = "github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md"
TITAN = "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3"
MEGATRON = "Narayanan et al. 2021, table 1: 1.7B on 32 A100, 137 TFLOP/s by equation 3"
LANGUINI = (
    "github.com/languini-kitchen/languini-kitchen, languini/projects/gpt/throughput_results.csv"
)

MPT = {"activation": "gelu", "norm": "layernorm", "positions": "alibi"}
MPT_SHAPES = {
    "125m": (768, 12, 12), "350m": (1024, 24, 16), "760m": (1536, 24, 12), "1b": (2048, 24, 16),
    "3b": (2560, 32, 20), "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56),
}  # fmt: skip
MPT_VOCABULARY = 50368
LLAMA_8B = {"kv_heads": 8, "feed_forward_width": 14336, "tied_head": False}
LANGUINI_SHAPES = {
    "tiny": (768, 4, 12), "small": (768, 12, 12), "medium": (1024, 24, 16), "large": (1536, 24, 16),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published run."""

    name: str
    source: str
    cluster: str
    num_ranks: int
    run: RunConfig
    vocab_size: int
    tokens_per_second: float
    """Of one device, as published."""
    compiled: bool = False
    fused_attention: bool = True
    checkpoints_half: bool = False
    """Whether every second product of a block is computed again, as torchtitan's selective
    activation checkpointing does: half way between none and all."""
    has_update: bool = True
    """Whether the published time holds the optimizer."""
    is_calibration: bool = False
    """Whether the cluster file's `product_fraction` was set by it; such rows test nothing."""

    @property
    def device(self) -> str:
        """Kind of device, whatever the number of hosts."""
        return self.cluster.partition("-")[0]

    def predict(self, run: RunConfig) -> StepTime:
        """Predict a step with what the published software did."""
        hardware = hardware_of(self.cluster, self.num_ranks)
        execution = replace(
            execution_of(run, hardware),
            compiled=self.compiled,
            fused_attention=self.fused_attention,
            skips_masked=True,  # their kernels know ALiBi
        )
        return step_time(self.run, self.vocab_size, self.num_ranks, hardware, execution=execution)

    @cached_property
    def predicted(self) -> float:
        """Tokens per second of one device."""
        step = self.predict(self.run)
        seconds = step.seconds if self.has_update else step.seconds - step.update
        if self.checkpoints_half:
            train = self.run.train.model_copy(update={"activation_checkpointing": True})
            all_again = self.predict(self.run.model_copy(update={"train": train}))
            seconds = (seconds + all_again.seconds) / 2
        return step.tokens / seconds / self.num_ranks

    @property
    def error_fraction(self) -> float:
        """Signed relative error of the prediction."""
        return self.predicted / self.tokens_per_second - 1.0


@cache
def hardware_of(cluster: str, num_ranks: int) -> HardwareConfig:
    """Give a shipped file's hardware with as many hosts as ranks fill."""
    hardware = load_cluster(CLUSTERS / f"{cluster}.yaml").hardware
    assert hardware is not None
    return hardware.with_nodes(max(1, num_ranks // hardware.devices_per_node))


def gpt(
    shape: tuple[int, int, int], length: int, batch: tuple[int, int, int], **fields: Any
) -> RunConfig:
    """Build a run of a GPT.

    Args:
        shape: Width, depth and heads.
        length: Tokens of a sample.
        batch: Micro-batch, accumulation and ranks.
        fields: Of the model, but `stage`, `checkpointing` and `precision`.
    """
    width, depth, heads = shape
    micro, accumulation, num_ranks = batch
    tokens = micro * accumulation * num_ranks * length
    stage = fields.pop("stage", 3)
    checkpointing = fields.pop("checkpointing", False)
    precision = fields.pop("precision", "bf16")
    model = {"family": "gpt", "width": width, "depth": depth, "heads": heads, **fields}
    return RunConfig.model_validate(
        {
            "model": {**model, "max_positions": length},
            "train": {
                "global_batch_tokens": tokens,
                "total_tokens": tokens,
                "sequence_tokens": length,
                "micro_batch_samples": micro,
                "activation_checkpointing": checkpointing,
            },
            "zero": {"stage": stage},
            "precision": precision,
        }
    )


def foundry(cluster: str, name: str, length: int, batch: tuple[int, int, int], rate: float,
            checkpointing: bool = False) -> Row:  # fmt: skip
    """Build a row of llm-foundry: MPT under FSDP, which splits what ZeRO stage 3 does."""
    run = gpt(MPT_SHAPES[name], length, batch, checkpointing=checkpointing, **MPT)
    return Row(
        name=f"llm-foundry {name} T={length}", source=FOUNDRY, cluster=cluster, num_ranks=batch[2],
        run=run, vocab_size=MPT_VOCABULARY, tokens_per_second=rate,
        is_calibration=name == "1b" and length == 2048 and batch[2] == 8,
    )  # fmt: skip


def languini(cluster: str, name: str, micro: int, rate: float) -> Row:
    """Build a row of Languini: compiled, plain attention, forward and backward only."""
    run = gpt(
        LANGUINI_SHAPES[name], 512, (micro, 1, 1), stage=0, precision="fp16", activation="gelu",
        norm="layernorm", tied_head=False,
    )  # fmt: skip
    return Row(
        name=f"Languini {name} T=512", source=LANGUINI, cluster=cluster, num_ranks=1, run=run,
        vocab_size=16384, tokens_per_second=rate, compiled=True, fused_attention=False,
        has_update=False, is_calibration=cluster == "gpu-24gb" and name == "small",
    )  # fmt: skip


def titan(num_ranks: int, rate: float, *, compiled: bool) -> Row:
    """Build a row of torchtitan: Llama 3.1 8B under FSDP, two samples a rank."""
    run = gpt((4096, 32, 32), 8192, (2, 1, num_ranks), **LLAMA_8B)
    return Row(
        name=f"torchtitan 8B T=8192{' compiled' if compiled else ''}", source=TITAN,
        cluster="h100-64", num_ranks=num_ranks, run=run, vocab_size=128256,
        tokens_per_second=rate, compiled=compiled, checkpoints_half=True,
    )  # fmt: skip


def megatron() -> Row:
    """Build the one row of Megatron's table without tensor or pipeline parallelism."""
    width, depth, vocabulary, length, samples, ranks = 2304, 24, 51200, 2048, 512, 32
    flops = 96 * samples * length * depth * width**2
    flops *= 1 + length / (6 * width) + vocabulary / (16 * depth * width)
    run = gpt(
        (width, depth, 24), length, (16, 1, ranks), stage=0, checkpointing=True, activation="gelu",
        norm="layernorm", positions="learned", biases=True, precision="fp16",
    )  # fmt: skip
    return Row(
        name="Megatron 1.7B T=2048", source=MEGATRON, cluster="a100-8", num_ranks=ranks, run=run,
        vocab_size=vocabulary, tokens_per_second=137e12 * samples * length / flops,
        fused_attention=False,
    )  # fmt: skip


def rows() -> list[Row]:
    """Give all rows."""
    a100, h100, many = "a100-8", "h100-8", "h100-64"
    return [
        foundry(a100, "125m", 2048, (32, 2, 8), 141_737),
        foundry(a100, "350m", 2048, (32, 2, 8), 58_782),
        foundry(a100, "760m", 2048, (24, 2, 8), 32_434),
        foundry(a100, "1b", 2048, (14, 4, 8), 20_513),
        foundry(a100, "3b", 2048, (10, 2, 8), 10_811),
        foundry(a100, "7b", 2048, (6, 2, 8), 4_641),
        foundry(a100, "13b", 2048, (2, 3, 8), 2_262),
        foundry(a100, "30b", 2048, (3, 21, 8), 916, checkpointing=True),
        foundry(a100, "1b", 8192, (3, 4, 8), 13_814),
        foundry(a100, "7b", 8192, (8, 2, 8), 3_206, checkpointing=True),
        foundry(h100, "760m", 2048, (24, 2, 8), 63_147),
        foundry(h100, "1b", 2048, (14, 1, 8), 45_455),
        foundry(h100, "3b", 1024, (20, 6, 8), 27_046),
        foundry(h100, "7b", 2048, (6, 1, 8), 10_643),
        foundry(h100, "13b", 2048, (2, 1, 8), 4_792),
        foundry(h100, "30b", 2048, (3, 21, 8), 2_002, checkpointing=True),
        foundry(h100, "1b", 8192, (3, 4, 8), 29_157),
        foundry(h100, "7b", 8192, (8, 2, 8), 6_935, checkpointing=True),
        foundry(many, "760m", 2048, (24, 1, 32), 67_971),
        foundry(many, "1b", 2048, (20, 1, 64), 44_402),
        foundry(many, "3b", 2048, (6, 3, 64), 22_525),
        foundry(many, "13b", 2048, (2, 1, 64), 4_800),
        titan(8, 5_762, compiled=False),
        titan(8, 6_667, compiled=True),
        titan(128, 5_605, compiled=False),
        titan(128, 6_514, compiled=True),
        megatron(),
        languini(a100, "tiny", 272, 343_182),
        languini(a100, "small", 128, 135_107),
        languini(a100, "medium", 53, 47_851),
        languini(a100, "large", 36, 27_713),
        languini("gpu-24gb", "tiny", 76, 141_864),
        languini("gpu-24gb", "small", 34, 55_416),
        languini("gpu-24gb", "medium", 10, 16_618),
        languini("gpu-24gb", "large", 4, 7_058),
    ]


def own() -> list[tuple[str, RunConfig, float]]:
    """Give steps of ours that docs/speed.md has for one CPU core: name, run, seconds."""
    bare = {"attention": "none", "feed_forward": False, "backbone": "vanilla"}
    gpt_2 = {"family": "gpt", "activation": "gelu", "norm": "layernorm", "positions": "learned"}
    models: list[tuple[str, dict[str, Any], float]] = [
        ("GPT beside nanoGPT", gpt_2, 0.815),
        ("GPT with biases beside GPT-2", {**gpt_2, "biases": True}, 0.832),
        ("LSTM with attention", {"family": "lstm_attention"}, 1.048),
        ("bare LSTM layers and head", {"family": "lstm_attention", **bare}, 0.640),
    ]
    train = {
        "global_batch_tokens": 2048, "total_tokens": 2048, "sequence_tokens": 256,
        "micro_batch_samples": 8,
    }  # fmt: skip
    shape = {"width": 256, "depth": 4, "heads": 4, "max_positions": 256}
    return [
        (
            name,
            RunConfig.model_validate(
                {"model": {**shape, **fields}, "train": train, "zero": {"stage": 0}}
            ),
            seconds,
        )
        for name, fields, seconds in models
    ]
