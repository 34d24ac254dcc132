"""From a model and a run to DeepSpeed ZeRO 0 to 3, behind the `Engine` protocol.

A step that is not finite is never applied, at any stage. Before the last backward all ranks sum
their losses; where the sum is not finite every rank multiplies its loss by nan, so that DeepSpeed's
own norm check, which covers a non-finite gradient of a finite loss as well, discards the step.
Stage 0 in fp32 has no such check: there the norm is computed here and the update left out.

A finite step above its limits is known as such only once DeepSpeed has computed the gradient norm,
in the middle of its step. What comes next at every stage is AdamW's own step, once for each group:
a hook before it takes the gradients away, and AdamW passes over what has none, moments included.
DeepSpeed then copies the unchanged master weights into the working copies, which are equal already.

Shapes: B micro-batch samples, T sequence tokens.
"""

import logging
import math
import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pipeline.config.batching import BatchPlan
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TokenBatch
from pipeline.errors import LaunchError
from pipeline.training.device import Laps, check_precision, fused_optimizer, to_device
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
)
from pipeline.training.lean_deepspeed import deepspeed
from pipeline.training.phases import altered, enter
from pipeline.training.zero_state import ZeroState


class DeepSpeedEngine:
    """Trains one model under DeepSpeed."""

    def __init__(
        self, model: torch.nn.Module, run: RunConfig, plan: BatchPlan, ranks: RankContext
    ) -> None:
        """Hand the model to DeepSpeed; see `build_engine`.

        Raises:
            ConfigError: The device cannot compute in this precision.
            LaunchError: DeepSpeed chose another device than this rank.
        """
        check_precision(run.precision, run.model.family, ranks.device)
        _prepare_deepspeed(ranks.device)
        model = model.to(ranks.device)
        num_parameters = sum(p.numel() for p in model.parameters())
        optimizer = build_optimizer(model, run.train.optimizer, fused=fused_optimizer(ranks.device))
        self._engine: Any = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(run, plan, num_parameters, ranks.device),
        )[0]
        self._ranks = ranks
        self._checks_norm_itself = run.zero.stage == 0 and run.precision == "fp32"
        self._limits = NO_LIMITS
        self._is_held = False
        optimizer.register_step_pre_hook(self._hold_back)
        self._state = ZeroState(self._engine, run.zero.stage, ranks.rank)
        self._is_measured = False

    def train_step(
        self,
        micro_batches: Sequence[TokenBatch],
        learning_rate: float,
        limits: StepLimits = NO_LIMITS,
    ) -> StepOutcome:
        """Take one optimizer step; see `Engine`."""
        num_tokens = int(sum_over_ranks([count_labels(micro_batches)], self._ranks)[0])
        # Not before: waiting for a rank whose data comes late is no part of this rank's forward.
        laps = Laps(self._ranks.device)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        sums = self._run_micro_batches(micro_batches, num_tokens, laps)
        self._is_measured = True
        self._limits = limits
        # Without a limit the device need not be waited for.
        self._is_held = limits.loss < math.inf and float(sums[0]) / num_tokens > limits.loss
        enter("optimizer")
        grad_norm, applied = self._update()
        laps.lap("optimizer")
        seconds = laps.seconds()
        return StepOutcome(
            loss_sum=float(sums[0]),
            text_loss_sum=float(sums[1]),
            num_tokens=num_tokens,
            grad_norm=grad_norm,
            applied=applied,
            forward_seconds=seconds["forward"],
            backward_seconds=seconds["backward"],
            optimizer_seconds=seconds["optimizer"],
        )

    def _run_micro_batches(
        self, micro_batches: Sequence[TokenBatch], num_tokens: int, laps: Laps
    ) -> torch.Tensor:
        """Accumulate the gradient of the mean loss; give `loss_sums` summed over all ranks."""
        self._engine.train()
        device = self._ranks.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        # DeepSpeed divides by the ranks what it sums over them; the factor takes that back.
        factor = torch.tensor(self._ranks.world_size / num_tokens, device=device)
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            self._engine.set_gradient_accumulation_boundary(is_last)
            enter("forward")
            nll_BT = self._engine(to_device(batch.inputs, device), to_device(batch.labels, device))
            nll_BT = altered("loss", nll_BT)
            sums += loss_sums(nll_BT, batch)
            laps.lap("forward")
            if is_last:
                enter("allreduce")
                dist.all_reduce(sums)
                factor = torch.where(sums[0].isfinite(), factor, torch.nan)
            enter("backward")
            self._backward(nll_BT.sum() * factor)
            laps.lap("backward")
        return sums

    def _backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients; the passes of the first step are measured on the way."""
        if not self._is_measured:
            self._state.note_gradients_after_backward(loss)
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._is_measured:
            self._state.note_gradients()

    def _update(self) -> tuple[float, bool]:
        """Apply the update if it is finite; give the norm before clipping and whether it was."""
        if self._checks_norm_itself:
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            grad_norm = float(torch.nn.utils.get_total_norm(gradients))
            self._is_held |= not np.isfinite(grad_norm) or grad_norm > self._limits.grad_norm
            if self._is_held:
                self._engine.zero_grad()
                return grad_norm, False
            self._engine.step()
            return grad_norm, True
        self._engine.step()
        applied = bool(self._engine.was_step_applied()) and not self._is_held
        return float(self._engine.get_global_grad_norm()), applied

    def _hold_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before AdamW updates a group: take its gradients away if the step is above its limits."""
        if not self._checks_norm_itself and self._limits.grad_norm < math.inf:
            norm = float(self._engine.optimizer._global_grad_norm)
            self._is_held |= norm > self._limits.grad_norm
        if self._is_held:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def evaluate(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Give the loss `[B, T]` of this rank's labels; see `Engine`."""
        self._engine.eval()
        device = self._ranks.device
        with torch.no_grad():
            nll_BT = self._engine(to_device(batch.inputs, device), to_device(batch.labels, device))
        return np.asarray(nll_BT.float().cpu().numpy(), dtype=np.float32)

    def export_state(self, names: Collection[str] | None = None) -> EngineState:
        """Give the canonical state; see `Engine`."""
        return self._state.export(names)

    def import_state(self, state: EngineState) -> None:
        """Replace parameters and optimizer state; see `Engine`."""
        self._state.restore(state)

    def state_bytes(self) -> StateBytes:
        """Measure this rank's model state; see `Engine`."""
        return self._state.state_bytes()


def deepspeed_config(
    run: RunConfig, plan: BatchPlan, num_parameters: int, device: torch.device
) -> dict[str, Any]:
    """Write out the DeepSpeed config; nothing is left to defaults that have changed before.

    Args:
        run: Precision, ZeRO stage and clipping.
        plan: Batch plan at this world size.
        num_parameters: Parameters of the model; larger buckets would only cost scratch memory.
        device: Overlap needs CUDA streams.
    """
    bucket = max(min(run.zero.bucket_elements, num_parameters), 1)
    zero_section: dict[str, Any] = {"stage": run.zero.stage}
    if run.zero.stage > 0:
        zero_section |= {
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_scatter": True,
        }
    if run.zero.stage == 3:
        zero_section |= {
            "stage3_param_persistence_threshold": run.zero.param_persistence_threshold,
            "stage3_prefetch_bucket_size": bucket,
            # DeepSpeed's 1e9 would keep all of a small model gathered from forward to backward.
            "stage3_max_live_parameters": bucket,
            "stage3_max_reuse_distance": bucket,
        }
    return {
        "train_batch_size": plan.global_batch_samples,
        "train_micro_batch_size_per_gpu": plan.micro_batch_samples,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": run.train.optimizer.gradient_clipping,
        "bf16": {"enabled": run.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": run.precision == "fp16", "loss_scale": 0},
        "zero_optimization": zero_section,
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
    }


def _prepare_deepspeed(device: torch.device) -> None:
    """Keep DeepSpeed from compiling, from chatting and from another device.

    Raises:
        LaunchError: DeepSpeed chose another accelerator.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Ranges for NVIDIA's profiler, around each of the thousand calls of a step at stage 3: without
    # CUDA nobody reads them, and they cost about a tenth of a small step.
    deepspeed.utils.nvtx.enable_nvtx = device.type == "cuda"
    # DeepSpeed 0.19 calls collectives under names that torch 2.13 deprecates, once a collective.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+. is deprecated", FutureWarning)
    # A shared cache of compiled extensions can hold the lock of a killed build, on which every
    # later start would hang.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / "tandem" / "torch_extensions"))
    # What could be compiled here, which DeepSpeed would find out by compiling a program in each
    # rank. All it asks for is an op for a CPU's collectives: minutes to compile, and never called.
    deepspeed.ops.__compatible_ops__ = {}
    chosen = deepspeed.get_accelerator().device_name()
    if chosen != device.type:
        raise LaunchError(
            f"DeepSpeed chose the accelerator {chosen!r} but this rank computes on {device.type}; "
            f"set DS_ACCELERATOR={device.type}"
        )
