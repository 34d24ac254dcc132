"""Layers that both families are built of: feed-forward and normalisation.

Shapes: `B` batch, `T` time, `D` model, `F` feed-forward.
"""

import math

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pipeline.config.model_base import ModelBase


class FeedForward(nn.Module):
    """Two matrices with GELU between them, or three with SwiGLU."""

    def __init__(self, config: ModelBase, *, biases: bool = False) -> None:
        super().__init__()
        hidden = config.resolved_feed_forward_width
        self.init_std = config.init_std
        self.is_gated = config.activation == "swiglu"
        self.approximation = "tanh" if config.activation == "gelu_tanh" else "none"
        self.up = nn.Linear(config.width, 2 * hidden if self.is_gated else hidden, bias=biases)
        self.down = nn.Linear(hidden, config.width, bias=biases)

    def initialize(self, generator: Generator, residual_scale: float) -> None:
        """Draw the matrices; the one that writes to the residual stream is scaled down."""
        initialize_linear(self.up, self.init_std, generator)
        initialize_linear(self.down, self.init_std * residual_scale, generator)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Give the transformed input, to be added to the residual stream.

        Source: Shazeer 2020, section 2 (SwiGLU); Hendrycks and Gimpel 2016 (GELU).
        """
        if self.is_gated:
            gate_BTF, value_BTF = self.up(x_BTD).chunk(2, dim=2)
            hidden_BTF = F.silu(gate_BTF) * value_BTF
        else:
            hidden_BTF = F.gelu(self.up(x_BTD), approximate=self.approximation)
        y_BTD: Tensor = self.down(hidden_BTF)
        return y_BTD


def build_norm(config: ModelBase) -> nn.RMSNorm | nn.LayerNorm:
    """Build one normalisation of the model's width."""
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.width, eps=config.norm_epsilon)


def initialize_linear(linear: nn.Linear, std: float, generator: Generator) -> None:
    """Draw a matrix, and zero its biases if it has any. Source: Radford et al. 2019, GPT-2 code."""
    nn.init.normal_(linear.weight, std=std, generator=generator)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def residual_scale(num_layers: int) -> float:
    """Give the factor on matrices that write to the residual stream, of which there are 2 a layer.

    Source: Radford et al. 2019, section 2.3.
    """
    return 1 / math.sqrt(2 * num_layers)
