"""From code that runs to what it did: collectives of a rank, matrix products by shape."""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPS = {
    "c10d.allreduce_": "all_reduce",
    "c10d.broadcast_": "broadcast",
    "c10d.reduce_": "reduce",
    "c10d.allgather_": "all_gather",
    "c10d._allgather_base_": "all_gather",
    "c10d.reduce_scatter_": "reduce_scatter",
    "c10d._reduce_scatter_base_": "reduce_scatter",
    "c10d.barrier": "barrier",
}
"""Dispatched name of a collective to how an estimate calls it."""


class CollectiveLog(TorchDispatchMode):
    """Notes every collective that this rank takes part in: which, and bytes of its whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        if name.startswith("c10d."):
            # A name that is missing here is an operation that no estimate knows.
            op = OPS[name]
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            # This one takes a list of outputs beside the input; all others one tensor, or the part
            # and the whole.
            is_listed = name == "c10d.allgather_"
            self.calls.append((op, sum(sizes[:-1]) if is_listed else max(sizes, default=0)))
        return func(*args, **(kwargs or {}))

    def counts(self) -> Counter[tuple[str, int]]:
        """Give operation and bytes to the number of calls."""
        return Counter(self.calls)


def label(config: Any) -> str:
    """Name a config in a test's id by what differs from the defaults."""
    return ",".join(map(str, config.model_dump(exclude_defaults=True).values()))


Shape = tuple[int, int, int, int]
"""Batch, m, n and k of a matrix product."""


class ProductLog(TorchDispatchMode):
    """Notes the shape of every matrix product, those inside of no kernel."""

    FIRST_OPERAND = {"aten.mm": 0, "aten.bmm": 0, "aten.addmm": 1, "aten.baddbmm": 1}

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[Shape] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = self.FIRST_OPERAND.get(str(func).rpartition(".")[0])
        if first is not None:
            *batch, m, k = args[first].shape
            self.shapes[(batch or [1])[0], m, args[first + 1].shape[-1], k] += 1
        return func(*args, **(kwargs or {}))
