"""The oracle: plain torch in fp32, everything on every rank, gradients summed one by one.

It shares no code with DeepSpeed, so that equal curves of both mean something.
"""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pipeline.config.batching import BatchPlan
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenBatch
from pipeline.errors import ConfigError
from pipeline.training.device import Laps, fused_optimizer, to_device
from pipeline.training.distributed import RankContext, sum_over_ranks
from pipeline.training.engine import (
    NO_LIMITS,
    EngineState,
    StateBytes,
    StepLimits,
    StepOutcome,
    build_optimizer,
    count_labels,
    loss_sums,
    open_moments,
    storage_bytes,
)


class TorchEngine:
    """Trains one model with `torch.optim.AdamW` and one all-reduce a parameter."""

    def __init__(
        self, model: torch.nn.Module, run: RunConfig, plan: BatchPlan, ranks: RankContext
    ) -> None:
        """Take over the model; see `build_engine`.

        Raises:
            ConfigError: The run is not fp32 at ZeRO stage 0.
        """
        if run.precision != "fp32" or run.zero.stage != 0:
            raise ConfigError(
                f"the torch engine runs fp32 at stage 0, got {run.precision} at {run.zero.stage}"
            )
        self._model = model.to(ranks.device)
        self._clipping = run.train.optimizer.gradient_clipping
        self._optimizer = build_optimizer(
            self._model, run.train.optimizer, fused=fused_optimizer(ranks.device)
        )
        self._parameters = dict(self._model.named_parameters())
        open_moments(self._optimizer, self._parameters.values())
        self._ranks = ranks
        self._gradient_bytes: int | None = None

    def train_step(
        self,
        micro_batches: Sequence[TokenBatch],
        learning_rate: float,
        limits: StepLimits = NO_LIMITS,
    ) -> StepOutcome:
        """Take one optimizer step; see `Engine`."""
        device = self._ranks.device
        num_tokens = int(sum_over_ranks([count_labels(micro_batches)], self._ranks)[0])
        laps = Laps(device)
        # Of all labels, and of those that stand for text.
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._optimizer.zero_grad()
        self._model.train()
        for batch in micro_batches:
            nll_BT = self._model(to_device(batch.inputs, device), to_device(batch.labels, device))
            sums += loss_sums(nll_BT, batch)
            laps.lap("forward")
            (nll_BT.sum() / num_tokens).backward()
            laps.lap("backward")
        dist.all_reduce(sums)
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        for gradient in gradients:
            dist.all_reduce(gradient)
        laps.lap("backward")
        self._gradient_bytes = storage_bytes(gradients)
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        applied = (
            bool(torch.isfinite(grad_norm) & torch.isfinite(sums[0]))
            and float(grad_norm) <= limits.grad_norm
            and float(sums[0]) / num_tokens <= limits.loss
        )
        if applied:
            self._apply(grad_norm, learning_rate)
        laps.lap("optimizer")
        seconds = laps.seconds()
        return StepOutcome(
            loss_sum=float(sums[0]),
            text_loss_sum=float(sums[1]),
            num_tokens=num_tokens,
            grad_norm=float(grad_norm),
            applied=applied,
            forward_seconds=seconds["forward"],
            backward_seconds=seconds["backward"],
            optimizer_seconds=seconds["optimizer"],
        )

    def _apply(self, grad_norm: torch.Tensor, learning_rate: float) -> None:
        if self._clipping > 0.0:
            torch.nn.utils.clip_grads_with_norm_(
                self._parameters.values(), self._clipping, grad_norm
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()

    def evaluate(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Give the loss `[B, T]` of this rank's labels; see `Engine`."""
        device = self._ranks.device
        self._model.eval()
        with torch.no_grad():
            nll_BT = self._model(to_device(batch.inputs, device), to_device(batch.labels, device))
        return np.asarray(nll_BT.float().cpu().numpy(), dtype=np.float32)

    def export_state(self, names: Collection[str] | None = None) -> EngineState:
        """Give the canonical state; see `Engine`."""
        kept = {k: p for k, p in self._parameters.items() if names is None or k in names}
        states = {k: self._optimizer.state[p] for k, p in kept.items()}
        return EngineState(
            parameters={k: p.detach().cpu().clone() for k, p in kept.items()},
            exp_avg={k: state["exp_avg"].cpu().clone() for k, state in states.items()},
            exp_avg_sq={k: state["exp_avg_sq"].cpu().clone() for k, state in states.items()},
            step=int(next(iter(self._optimizer.state.values()))["step"]),
        )

    @torch.no_grad()
    def import_state(self, state: EngineState) -> None:
        """Replace parameters and optimizer state; see `Engine`."""
        for name, parameter in self._parameters.items():
            parameter.copy_(state.parameters[name])
            moments = self._optimizer.state[parameter]
            moments["exp_avg"].copy_(state.exp_avg[name])
            moments["exp_avg_sq"].copy_(state.exp_avg_sq[name])
            moments["step"].fill_(state.step)

    def state_bytes(self) -> StateBytes:
        """Measure this rank's model state; see `Engine`.

        Raises:
            RuntimeError: No step was taken yet, so that there are no gradients.
        """
        if self._gradient_bytes is None:
            raise RuntimeError("state_bytes needs one train_step: gradients come with it")
        state = self._optimizer.state.values()
        moments = [t for s in state for t in s.values() if isinstance(t, torch.Tensor)]
        return StateBytes(
            parameters=storage_bytes(list(self._parameters.values())),
            gradients=self._gradient_bytes,
            optimizer=storage_bytes(moments),
        )
