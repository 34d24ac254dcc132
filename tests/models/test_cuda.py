"""Both families on an NVIDIA device: cuDNN and fused attention give what the CPU gives.

Shapes: `B` batch, `T` time.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config.gpt import GptConfig
from pipeline.config.lstm import LstmConfig
from pipeline.config.model import ModelConfig
from pipeline.errors import LaunchError
from pipeline.models import build_model

pytestmark = pytest.mark.gpu

CONFIGS = [
    GptConfig(width=64, depth=2),
    GptConfig(width=64, depth=2, kv_heads=2, qk_norm=True, biases=True, tied_head=False),
    GptConfig(width=64, depth=2, positions="alibi", window_tokens=9),
    LstmConfig(width=64, depth=2),
    LstmConfig(width=64, depth=2, hidden_width=96, window_tokens=5),
    LstmConfig(width=64, depth=2, cell="gru", attention="additive"),
    LstmConfig(width=64, depth=2, cell="elman", attention="dot"),
    LstmConfig(width=64, depth=2, cell="min_lstm"),
    LstmConfig(width=64, depth=2, attention="dot", input_feeding=True),
]


def losses_on(config: ModelConfig, device: str, dtype: torch.dtype) -> torch.Tensor:
    tokens = torch.randint(64, (4, 65), generator=torch.Generator().manual_seed(0)).to(device)
    model = build_model(config, 64, seed=0).to(device, dtype)
    losses_BT: torch.Tensor = model(tokens[:, :-1], tokens[:, 1:])
    losses_BT.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return losses_BT.detach().cpu()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_losses_on_cuda_equal_those_of_the_cpu(
    config: ModelConfig, dtype: torch.dtype, tolerance: float
) -> None:
    expected_BT = losses_on(config, "cpu", torch.float32)
    actual_BT = losses_on(config, "cuda", dtype)
    torch.testing.assert_close(actual_BT, expected_BT, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recurrent_layer_runs_on_cudnn(cell: str, dtype: torch.dtype) -> None:
    config = LstmConfig.model_validate({"width": 64, "depth": 1, "cell": cell})
    model = build_model(config, 64, seed=0).to("cuda", dtype)
    tokens = torch.zeros(2, 33, dtype=torch.long, device="cuda")
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    names = {event.key for event in found.key_averages()}
    assert {"aten::_cudnn_rnn", "aten::_cudnn_rnn_backward"} <= names


def test_a_recurrent_layer_without_cudnn_is_refused() -> None:
    model = build_model(LstmConfig(width=64, depth=1), 64, seed=0).to("cuda")
    tokens = torch.zeros(2, 8, dtype=torch.long, device="cuda")
    with (
        torch.backends.cudnn.flags(enabled=False),
        pytest.raises(LaunchError, match="cannot run on cuDNN .*legal: float32, bfloat16"),
    ):
        model.logits(tokens)
