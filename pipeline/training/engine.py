"""The seam between the training loop and what holds parameters, gradients and optimizer state.

Shapes: B micro-batch samples, T sequence tokens.
"""

import importlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.batching import IGNORED_LABEL, BatchPlan
from pipeline.config.schema import OptimizerConfig, RunConfig
from pipeline.data.loader import TokenBatch
from pipeline.training import ENGINES
from pipeline.training.device import to_device
from pipeline.training.distributed import RankContext


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """What a step may not exceed to be applied; the same on every rank."""

    loss: float = math.inf
    """Mean loss of the global batch, in nats per token."""
    grad_norm: float = math.inf
    """Global gradient norm before clipping."""


NO_LIMITS = StepLimits()


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one optimizer step did, over all ranks and micro-batches; the same on every rank."""

    loss_sum: float
    """Sum of the negative log-likelihood of all labelled tokens, in nats, before the update."""
    text_loss_sum: float
    """The part of `loss_sum` that belongs to labels with text, without ends of documents."""
    num_tokens: int
    """Labelled tokens of the global batch."""
    grad_norm: float
    """Global L2 norm of the gradient of the mean loss before clipping; inf or nan if not finite."""
    applied: bool
    """Whether the parameters were updated; False when loss or gradient norm was not finite or above
    its limit. Then parameters and moments are what they were before the step."""
    forward_seconds: float
    """Forward passes of this rank, with the head's gradient, which the loss computes in them."""
    backward_seconds: float
    """Backward passes of this rank, gradient reduction included."""
    optimizer_seconds: float
    """Clipping, update and, where parameters are split, their collection, on this rank."""

    @property
    def loss(self) -> float:
        """Mean loss of the global batch, in nats per token."""
        return self.loss_sum / self.num_tokens

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are numbers."""
        return math.isfinite(self.loss_sum) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """Canonical training state: float32, by parameter name, the same at every stage and world size.

    The mappings may read lazily; an engine that imports asks for one tensor at a time.
    """

    parameters: Mapping[str, torch.Tensor]
    """Master weights in the shape of the model's own parameters."""
    exp_avg: Mapping[str, torch.Tensor]
    """AdamW's first moments."""
    exp_avg_sq: Mapping[str, torch.Tensor]
    """AdamW's second moments."""
    step: int
    """Updates that the optimizer has applied; skipped steps do not count."""


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of model state that one rank holds, summed over distinct tensor storages."""

    parameters: int
    """Weights that forward and backward read; under ZeRO 3 this rank's parts."""
    gradients: int
    """Gradients that stand when the update begins, without communication buckets."""
    optimizer: int
    """Moments and, where the engine keeps them apart from the weights, float32 master weights."""


class Engine(Protocol):
    """Trains and evaluates one model on all ranks; every method is collective but `state_bytes`."""

    def train_step(
        self,
        micro_batches: Sequence[TokenBatch],
        learning_rate: float,
        limits: StepLimits = NO_LIMITS,
    ) -> StepOutcome:
        """Take one optimizer step on the mean loss over all labelled tokens of the global batch.

        Args:
            micro_batches: This rank's micro-batches; the same number on every rank.
            learning_rate: Learning rate of this step.
            limits: Above which the step is not applied.
        """
        ...

    def evaluate(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Give the negative log-likelihood `[B, T]` of this rank's labels, in nats.

        Ignored labels give 0. Every rank must call it equally often.
        """
        ...

    def export_state(self, names: Collection[str] | None = None) -> EngineState:
        """Give the canonical state on the CPU, for the parameters that this rank wants to keep.

        Args:
            names: Parameter names to keep; None keeps all. Ranks may differ.
        """
        ...

    def import_state(self, state: EngineState) -> None:
        """Replace parameters and optimizer state; every rank passes the complete state."""
        ...

    def state_bytes(self) -> StateBytes:
        """Measure this rank's model state from its tensors; one step must have been taken."""
        ...


def build_engine(
    model: torch.nn.Module,
    run: RunConfig,
    plan: BatchPlan,
    ranks: RankContext,
    name: str = "deepspeed",
) -> Engine:
    """Build an engine around a model.

    Args:
        model: The model on the CPU, equal on every rank; the engine takes it over.
        run: Optimizer, precision and ZeRO stage.
        plan: Batch plan at this world size.
        ranks: This rank among the others.
        name: A key of `ENGINES`.

    Raises:
        ConfigError: The engine cannot run this precision or stage here.
    """
    module, _, attribute = ENGINES[name].partition(":")
    engine_class = getattr(importlib.import_module(module), attribute)
    return cast(Engine, engine_class(model, run, plan, ranks))


def parameter_groups(model: torch.nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Split parameters into those that decay, matrices, and those that do not, gains and biases.

    Args:
        model: A model whose parameters have their full shape.
        optimizer: Holds the weight decay.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if p.ndim >= 2],
            "weight_decay": optimizer.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: torch.nn.Module, optimizer: OptimizerConfig, *, fused: bool
) -> torch.optim.AdamW:
    """Build AdamW with a learning rate of zero; the engine sets the rate of each step.

    A rate of zero also makes harmless the empty steps that DeepSpeed takes while it starts.

    Args:
        model: A model whose parameters have their full shape.
        optimizer: Moments, epsilon and weight decay.
        fused: Whether to use the fused kernel, on CUDA.
    """
    return torch.optim.AdamW(
        parameter_groups(model, optimizer),
        lr=0.0,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        fused=fused,
    )


def open_moments(optimizer: torch.optim.AdamW, masters: Iterable[torch.Tensor]) -> None:
    """Give every master weight AdamW's state as it is before the first update.

    AdamW would make it in the first update. It is made before, so that it can be exported and
    restored at once, and so that DeepSpeed, which links moments to parameters after the first
    group's first update, finds those of all groups.

    Args:
        optimizer: Holds the state.
        masters: The float32 tensors that it updates.
    """
    for master in masters:
        if not optimizer.state[master]:
            # The fused kernel keeps its count beside the parameter, the plain one on the CPU.
            count_device = master.device if optimizer.defaults["fused"] else torch.device("cpu")
            optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=count_device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }


def count_labels(micro_batches: Sequence[TokenBatch]) -> int:
    """Count the labelled tokens of this rank's micro-batches."""
    return sum(int(np.count_nonzero(batch.labels != IGNORED_LABEL)) for batch in micro_batches)


def loss_sums(nll_BT: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """Sum the losses of a micro-batch over all labels, and over those that stand for text.

    Args:
        nll_BT: Loss of each label, in nats.
        batch: The micro-batch that it was computed on.

    Returns:
        float64 [2], without gradient.
    """
    nll_BT = nll_BT.detach()
    is_text_BT = to_device(batch.text_bytes > 0, nll_BT.device)
    sums = torch.stack([nll_BT.sum(), torch.where(is_text_BT, nll_BT, 0.0).sum()])
    return sums.double()


def storage_bytes(tensors: Collection[torch.Tensor]) -> int:
    """Sum the bytes of the distinct storages behind tensors, so that views count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
