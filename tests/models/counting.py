"""From a pass of a model to what it really did: chained products, and bytes kept for backward."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ProductChain(TorchDispatchMode):
    """Traces how many matrix products stand behind each tensor, one after the other."""

    PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.lengths: dict[int, int] = {}
        # A tensor that is gone would leave its id to another.
        self.alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        length = max((self.lengths.get(id(tensor), 0) for tensor in given), default=0)
        length += str(func).startswith(self.PRODUCTS)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.lengths[id(tensor)] = length
                self.alive.append(tensor)
        return result

    def of(self, tensor: Tensor) -> int:
        return self.lengths[id(tensor)]


def saved_bytes(model: nn.Module, inputs_BT: Tensor, labels_BT: Tensor) -> int:
    """Bytes of the distinct storages behind what autograd holds, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(inputs_BT, labels_BT)
    return sum(held.values())
