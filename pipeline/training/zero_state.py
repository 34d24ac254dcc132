"""Model state in and out of a DeepSpeed engine at any ZeRO stage: canonical tensors, and bytes.

Where DeepSpeed 0.19 keeps the float32 master weights and AdamW's moments:

- stage 0 in fp32: in the model's parameters and the torch optimizer's own state;
- stage 0 in bf16 or fp16: in a float32 copy beside each parameter (`fp16_groups`, `fp32_groups` of
  its optimizer wrapper), with the torch optimizer's state keyed by the copy;
- stages 1 to 3: in flat partitions, reached through `safe_get_...` and `safe_set_...`. The setters
  leave the working copy stale, so it is written as well; without that the first forward would use
  the old weights and nothing would say so. Stages 1 and 2 link moments to parameters after the
  first group of the first update, when the second group has none; `open_moments` comes before.
"""

from collections.abc import Collection, Iterable
from typing import Any, Protocol

import torch

# isort: off
import pipeline.training.lean_deepspeed  # noqa: F401 - without MLflow, so before the others
from deepspeed import zero
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
# isort: on

from pipeline.training.engine import EngineState, StateBytes, open_moments, storage_bytes

MOMENTS = ("exp_avg", "exp_avg_sq")


class ParameterState(Protocol):
    """Reads and writes the canonical tensors of one parameter; every call is collective."""

    def get(self, parameter: torch.nn.Parameter, moment: str | None) -> torch.Tensor:
        """Give the float32 master weight, or a moment, in full shape."""
        ...

    def set(self, parameter: torch.nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
        """Replace the float32 master weight and its working copy, or a moment."""
        ...


class ReplicatedState:
    """Stage 0: every rank holds all of it."""

    def __init__(self, engine: Any) -> None:
        """Find the float32 copy of each parameter, or the parameter itself in fp32."""
        self._optimizer: torch.optim.Optimizer = engine.basic_optimizer
        working = getattr(engine.optimizer, "fp16_groups", [])
        masters = getattr(engine.optimizer, "fp32_groups", [])
        self._masters = {
            id(parameter): master
            for parameters, copies in zip(working, masters, strict=True)
            for parameter, master in zip(parameters, copies, strict=True)
        }

    def get(self, parameter: torch.nn.Parameter, moment: str | None) -> torch.Tensor:
        """Give the float32 master weight, or a moment."""
        master = self._masters.get(id(parameter), parameter)
        found: torch.Tensor = (
            master.detach() if moment is None else self._optimizer.state[master][moment]
        )
        return found

    def set(self, parameter: torch.nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
        """Replace the float32 master weight and its working copy, or a moment."""
        self.get(parameter, moment).copy_(value)
        if moment is None:
            parameter.data.copy_(value)


class FlatState:
    """Stages 1 and 2: optimizer state in flat partitions, weights whole on every rank."""

    def get(self, parameter: torch.nn.Parameter, moment: str | None) -> torch.Tensor:
        """Collect the float32 master weight, or a moment, from its partitions."""
        return _collect(parameter, moment)

    def set(self, parameter: torch.nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
        """Write this rank's partition, and the whole working copy."""
        if moment is not None:
            safe_set_full_optimizer_state(parameter, value, moment)
            return
        safe_set_full_fp32_param(parameter, value)
        parameter.data.copy_(value)


class ShardedState:
    """Stage 3: every parameter is cut into one equal part a rank, the last one padded."""

    def __init__(self, rank: int) -> None:
        """Remember which part is this rank's."""
        self._rank = rank

    def get(self, parameter: torch.nn.Parameter, moment: str | None) -> torch.Tensor:
        """Collect the float32 master weight, or a moment, from its parts."""
        return _collect(parameter, moment)

    def set(self, parameter: torch.nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
        """Write this rank's part of the master weight and of the working copy, or of a moment."""
        # The full setter narrows past the end of a tensor whose size does not divide by the ranks.
        part = self._part_of(parameter, value)
        if moment is not None:
            safe_set_local_optimizer_state(parameter, part, moment)
            return
        safe_set_local_fp32_param(parameter, part)
        with zero.GatheredParameters(parameter, modifier_rank=0):
            if self._rank == 0:
                parameter.data.copy_(value)

    def _part_of(self, parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        size = safe_get_local_fp32_param(parameter).numel()
        flat = value.flatten()[self._rank * size : (self._rank + 1) * size]
        return torch.nn.functional.pad(flat, (0, size - flat.numel()))


def _collect(parameter: torch.nn.Parameter, moment: str | None) -> torch.Tensor:
    full = (
        safe_get_full_fp32_param(parameter)
        if moment is None
        else safe_get_full_optimizer_state(parameter, moment)
    )
    assert isinstance(full, torch.Tensor), "the parameter is not linked to its optimizer state"
    return full


class ZeroState:
    """Canonical state of one DeepSpeed engine."""

    def __init__(self, engine: Any, stage: int, rank: int) -> None:
        """Choose the accessor of the stage.

        Args:
            engine: What `deepspeed.initialize` returned.
            stage: ZeRO stage.
            rank: This rank.
        """
        self._engine = engine
        self._stage = stage
        self._parameters: dict[str, torch.nn.Parameter] = dict(engine.module.named_parameters())
        self._access: ParameterState = (
            ReplicatedState(engine)
            if stage == 0
            else ShardedState(rank)
            if stage == 3
            else FlatState()
        )
        self._gradient_bytes = 0
        self._open_moments()

    def _open_moments(self) -> None:
        optimizer = self._engine.basic_optimizer
        groups = optimizer.param_groups
        # Stage 3 puts its partitions into the groups only while it updates.
        masters = (
            self._engine.optimizer.fp32_partitioned_groups_flat
            if self._stage == 3
            else [master for group in groups for master in group["params"]]
        )
        open_moments(optimizer, masters)
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        # Stage 0 in 16 bits takes an empty step while it starts; its first real step would be
        # corrected as a second one.
        self._set_step(0)

    def _set_step(self, step: int) -> None:
        """Set the count that AdamW corrects its bias by."""
        for state in self._engine.basic_optimizer.state.values():
            state["step"].fill_(step)

    @torch.no_grad()
    def export(self, names: Collection[str] | None) -> EngineState:
        """Collect every parameter in turn; keep on the CPU what this rank wants.

        Args:
            names: Parameters to keep, or None for all.
        """
        kept: dict[str | None, dict[str, torch.Tensor]] = {k: {} for k in (None, *MOMENTS)}
        for name, parameter in self._parameters.items():
            for moment, tensors in kept.items():
                full = self._access.get(parameter, moment)
                if names is None or name in names:
                    tensors[name] = full.to("cpu", torch.float32, copy=True).contiguous()
        return EngineState(
            parameters=kept[None],
            exp_avg=kept["exp_avg"],
            exp_avg_sq=kept["exp_avg_sq"],
            step=int(next(iter(self._engine.basic_optimizer.state.values()))["step"]),
        )

    @torch.no_grad()
    def restore(self, state: EngineState) -> None:
        """Write every parameter and moment."""
        sources = {None: state.parameters, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        for name, parameter in self._parameters.items():
            for moment, tensors in sources.items():
                value = tensors[name].to(self._engine.device, torch.float32)
                self._access.set(parameter, moment, value.reshape(self._shape(parameter)))
        self._set_step(state.step)

    def _shape(self, parameter: torch.nn.Parameter) -> torch.Size:
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def note_gradients(self) -> None:
        """Measure the gradients that stand now; the largest measurement so far is kept.

        Counted are the parameters' own gradients and the averaged parts that the ZeRO optimizer
        keeps. Communication buckets are not: they are scratch whose size the config sets.
        """
        tensors = [p.grad for p in self._parameters.values() if p.grad is not None]
        averaged = getattr(self._engine.optimizer, "averaged_gradients", {})
        tensors += _flatten_tensors(averaged.values())
        self._gradient_bytes = max(self._gradient_bytes, storage_bytes(tensors))

    def note_gradients_after_backward(self, loss: torch.Tensor) -> None:
        """Measure at the end of the backward pass of `loss`, before stage 1 reduces.

        Stage 1 holds every gradient only up to there; stages 2 and 3 move theirs into buckets on
        the way, and what they keep stands after the pass.
        """
        if self._stage <= 1:
            queue = torch.autograd.Variable._execution_engine.queue_callback
            hooked: Any = loss
            hooked.register_hook(lambda _: queue(self.note_gradients))

    def state_bytes(self) -> StateBytes:
        """Measure this rank's state.

        Under stage 3 a parameter is this rank's part of it, and the whole where the persistence
        threshold keeps it so; copies gathered for a pass are scratch and do not count.

        Raises:
            RuntimeError: No step was taken yet, so that there are no gradients.
        """
        if not self._gradient_bytes:
            raise RuntimeError("state_bytes needs one train_step: gradients come with it")
        if self._stage == 3:
            mine: list[Any] = list(self._parameters.values())
            parameters = [p.ds_tensor for p in mine] + [p.data for p in mine if p.ds_persist]
        else:
            parameters = [p.data for p in self._parameters.values()]
        state = self._engine.basic_optimizer.state
        moments = [t for s in state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        parameter_bytes = storage_bytes(parameters)
        everything = storage_bytes([*parameters, *state.keys(), *moments])
        return StateBytes(
            parameters=parameter_bytes,
            gradients=self._gradient_bytes,
            optimizer=everything - parameter_bytes,
        )


def _flatten_tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _flatten_tensors(value)
    return found
