"""Every model config: the union that `model.family` tells apart."""

from typing import Annotated

from pydantic import Field

from pipeline.config.gpt import GptConfig
from pipeline.config.lstm import LstmConfig

ModelConfig = Annotated[GptConfig | LstmConfig, Field(discriminator="family")]
"""Any registered model config; `family` tells which."""
