"""From a model's config to its parameters by module: names, shapes, order of use and of gradients.

DeepSpeed cuts buckets and gathers parameters in these orders, so counts of its collectives need
them. Tests hold them equal to the built models'.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from pipeline.config.gpt import GptConfig
from pipeline.config.lstm import LstmConfig
from pipeline.config.lstm_fields import NUM_GATES
from pipeline.config.model_base import ModelBase

ROOT = ""
"""Name of the model itself, which owns embedding, head and learned positions."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a model."""

    name: str
    shape: tuple[int, ...]

    @cached_property
    def num_elements(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it decays, which also makes its group in the optimizer."""
        return len(self.shape) >= 2


@dataclass(frozen=True, kw_only=True)
class Module:
    """A module that runs in a forward pass."""

    name: str
    parameters: tuple[Parameter, ...] = ()
    """Its own, in the order of `named_parameters`; those of its children are theirs."""
    children: tuple["Module", ...] = ()
    """Modules that run inside of it, in the order of the forward pass."""
    ready: tuple[str, ...] = ()
    """Last parts of the names in the order in which backward ends their gradients; empty: as in
    `parameters`."""
    place: int = 0
    """Moves it before or after its siblings in `named_parameters`, which follows attributes; else
    it stands as it runs."""
    is_linear: bool = False
    """Whether it is one call of torch's linear function."""
    keeps_values: bool = True
    """Whether its own backward reads what its forward pass kept, as all do but a dropout of 0 and
    what only calls its children."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All parameters of a model."""

    root: Module
    """The model; its children stand in the order of the forward pass."""
    parameters: tuple[Parameter, ...]
    """In the order of `named_parameters`, in which DeepSpeed takes them."""
    gradients: tuple[Parameter, ...]
    """In the order in which the backward pass ends their gradients."""
    sharded_gradients: tuple[Parameter, ...]
    """The same at ZeRO 3, for which DeepSpeed puts a linear function of its own in the place of
    torch's; it hands over the matrix before the bias."""
    blocks: tuple[Module, ...]
    """What activation checkpointing runs again, one at a time."""


@lru_cache(maxsize=64)
def layout_of(model: GptConfig | LstmConfig, vocab_size: int, is_packed: bool = False) -> Layout:
    """Lay out the parameters of a model.

    Args:
        model: The config.
        vocab_size: Entries of the tokenizer; `model.vocab_size` may pad the table beyond it.
        is_packed: Whether states start anew in each document, for which recurrent layers call
            another kernel, whose gradients come in another order.
    """
    rows = model.resolved_vocab_size(vocab_size)
    own = [Parameter(name="embedding_VD", shape=(rows, model.width))]
    if not model.tied_head:
        own.append(Parameter(name="head_VD", shape=(rows, model.width)))
    if isinstance(model, GptConfig):
        if model.positions == "learned":
            own.append(Parameter(name="positions_PD", shape=(model.max_positions, model.width)))
        blocks = [_gpt_block(model, f"blocks.{index}") for index in range(model.depth)]
        body = blocks
    else:
        blocks = [_recurrent_layer(model, index, is_packed) for index in range(model.depth)]
        body = list(blocks)
        after = model.depth - (0 if model.attention_after == "last" else 1)
        body[after:after] = _recall(model)
    last = Module(name="final_norm", keeps_values=False)
    if not _is_vanilla(model):
        last = _norm(model, "final_norm", place=-1)
    root = Module(name=ROOT, parameters=tuple(own), children=(*body, last))
    return Layout(
        root=root,
        parameters=tuple(_as_named(root)),
        gradients=tuple(_as_ready(root, is_sharded=False)),
        sharded_gradients=tuple(_as_ready(root, is_sharded=True)),
        blocks=tuple(blocks),
    )


def _as_named(module: Module) -> Iterator[Parameter]:
    """Give the parameters as `named_parameters` does: by attribute, not by use."""
    yield from module.parameters
    for child in sorted(module.children, key=lambda child: child.place):
        yield from _as_named(child)


def _as_ready(root: Module, *, is_sharded: bool) -> Iterator[Parameter]:
    """Give the parameters as backward ends their gradients: what was used last comes first."""
    own = {parameter.name: parameter for parameter in root.parameters}
    if "head_VD" in own:
        yield own["head_VD"]
    for child in reversed(root.children):
        yield from _ready(child, is_sharded=is_sharded)
    yield from (own[name] for name in ("positions_PD", "embedding_VD") if name in own)


def _ready(module: Module, *, is_sharded: bool) -> Iterator[Parameter]:
    # Additive attention's own vector works between its first and its second matrix.
    for child in reversed(module.children[1:]):
        yield from _ready(child, is_sharded=is_sharded)
    by_end = {parameter.name.rpartition(".")[2]: parameter for parameter in module.parameters}
    names = module.ready or tuple(by_end)
    if is_sharded and module.is_linear:
        names = tuple(reversed(names))
    yield from (by_end[name] for name in names)
    for child in module.children[:1]:
        yield from _ready(child, is_sharded=is_sharded)


def _gpt_block(model: GptConfig, name: str) -> Module:
    width = model.width
    heads = model.heads + 2 * model.resolved_kv_heads
    biases = model.biases
    head_norms = [
        Module(name=f"{name}.attention.{norm}", parameters=(weight,), place=1)
        for norm in (("query_norm", "key_norm") if model.qk_norm else ())
        for weight in [Parameter(name=f"{name}.attention.{norm}.weight", shape=(model.head_width,))]
    ]
    dropout = Module(name=f"{name}.dropout", keeps_values=model.dropout > 0.0, place=1)
    attention = Module(
        name=f"{name}.attention",
        children=(
            _linear(f"{name}.attention.qkv", heads * model.head_width, width, biases=biases),
            *head_norms,
            _linear(f"{name}.attention.out", width, width, biases=biases),
        ),
        keeps_values=False,
    )
    return Module(
        name=name,
        children=(
            _norm(model, f"{name}.attention_norm"), attention, dropout,
            _norm(model, f"{name}.feed_forward_norm"), _feed_forward(model, name, biases), dropout,
        ),
        keeps_values=False,
    )  # fmt: skip


def _feed_forward(model: ModelBase, name: str, biases: bool = False) -> Module:
    inner = model.resolved_feed_forward_width
    up = 2 * inner if model.activation == "swiglu" else inner
    return Module(
        name=f"{name}.feed_forward",
        children=(
            _linear(f"{name}.feed_forward.up", up, model.width, biases=biases),
            _linear(f"{name}.feed_forward.down", model.width, inner, biases=biases),
        ),
        keeps_values=False,
    )


def _recurrent_layer(model: LstmConfig, index: int, is_packed: bool) -> Module:
    name, width, hidden = f"layers.{index}", model.width, model.resolved_hidden_width
    modules = [] if _is_vanilla(model) else [_norm(model, f"{name}.cell_norm")]
    reads = width * (2 if model.input_feeding and not index else 1)
    modules.append(_cell(model, name, reads, is_packed))
    if hidden != width:
        modules.append(_linear(f"{name}.projection", width, hidden))
    if model.feed_forward:
        modules += [_norm(model, f"{name}.feed_forward_norm"), _feed_forward(model, name)]
    # Its last operation is a dropout.
    return Module(name=name, children=tuple(modules), keeps_values=model.dropout > 0.0)


def _cell(model: LstmConfig, name: str, read_width: int, is_packed: bool) -> Module:
    gates, hidden = NUM_GATES[model.cell] * model.resolved_hidden_width, model.resolved_hidden_width
    shapes: dict[str, tuple[int, ...]] = {
        "weight_ih_l0": (gates, read_width), "bias_ih_l0": (gates,),
    }  # fmt: skip
    ready: tuple[str, ...] = ("bias_ih_l0", "weight_ih_l0")
    if model.cell != "min_lstm":
        shapes |= {"weight_hh_l0": (gates, hidden), "bias_hh_l0": (gates,)}
        # Kernels differ in the order in which they hand over their gradients; these are a CPU's.
        if model.input_feeding:
            ready = ("bias_ih_l0", "weight_ih_l0", "bias_hh_l0", "weight_hh_l0")
        elif model.cell == "lstm" and not is_packed:
            ready = ("weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "bias_ih_l0")
        else:
            ready = ("bias_hh_l0", "weight_hh_l0", "bias_ih_l0", "weight_ih_l0")
    return Module(
        name=f"{name}.cell",
        parameters=tuple(
            Parameter(name=f"{name}.cell.{end}", shape=shape) for end, shape in shapes.items()
        ),
        ready=ready,
        is_linear=model.cell == "min_lstm",
    )


def _recall(model: LstmConfig) -> list[Module]:
    width = model.width
    if model.attention == "none":
        return []
    norms = [] if _is_vanilla(model) else [_norm(model, "attention_norm", place=2)]
    combine = _linear("attention.combine", width, 2 * width)
    parts: tuple[Module, ...] = (combine,)
    own: tuple[Parameter, ...] = ()
    if model.attention == "scaled_dot":
        qkv = _linear("attention.qkv", 3 * width, width)
        parts = (qkv, _linear("attention.out", width, width))
    if model.attention == "additive":
        # It is younger than `combine`, which it runs before.
        parts = (_linear("attention.query_key", 2 * width, width, place=1), combine)
        own = (Parameter(name="attention.score_D", shape=(width,)),)
    return [*norms, Module(name="attention", parameters=own, children=parts, place=1)]


def _linear(name: str, rows: int, columns: int, *, biases: bool = False, place: int = 0) -> Module:
    parameters = [Parameter(name=f"{name}.weight", shape=(rows, columns))]
    if biases:
        parameters.append(Parameter(name=f"{name}.bias", shape=(rows,)))
    ready = ("bias", "weight") if biases else ("weight",)
    return Module(name=name, parameters=tuple(parameters), ready=ready, place=place, is_linear=True)


def _norm(model: ModelBase, name: str, *, place: int = 0) -> Module:
    parts = ("weight",) if model.norm == "rmsnorm" else ("weight", "bias")
    return Module(
        name=name,
        parameters=tuple(Parameter(name=f"{name}.{part}", shape=(model.width,)) for part in parts),
        place=place,
    )


def _is_vanilla(model: GptConfig | LstmConfig) -> bool:
    return isinstance(model, LstmConfig) and model.backbone == "vanilla"
