"""Both families on an NVIDIA device: cuDNN and fused attention give what the CPU gives."""

import pytest
import torch

from pipeline.config.gpt import GptConfig
from pipeline.config.lstm import LstmConfig
from pipeline.config.model import ModelConfig
from pipeline.models import build_model

pytestmark = pytest.mark.gpu

CONFIGS = [
    GptConfig(width=64, depth=2),
    LstmConfig(width=64, depth=2),
    LstmConfig(width=64, depth=2, hidden_width=96, window_tokens=5),
]


def losses_on(config: ModelConfig, device: str, dtype: torch.dtype) -> torch.Tensor:
    tokens = torch.randint(64, (4, 65), generator=torch.Generator().manual_seed(0)).to(device)
    model = build_model(config, 64, seed=0).to(device, dtype)
    losses_BT: torch.Tensor = model(tokens[:, :-1], tokens[:, 1:])
    losses_BT.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return losses_BT.detach().cpu()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_losses_on_cuda_equal_those_of_the_cpu(
    config: ModelConfig, dtype: torch.dtype, tolerance: float
) -> None:
    expected_BT = losses_on(config, "cpu", torch.float32)
    actual_BT = losses_on(config, "cuda", dtype)
    torch.testing.assert_close(actual_BT, expected_BT, rtol=0.0, atol=tolerance)
