"""Model families: from a model config to a causal language model in PyTorch.

To add a family: a file with a `LanguageModel`, a config class in `pipeline.config.model`, one line
in `MODELS`, one YAML in configs/run. The contract suite then runs over it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pipeline.config.model import ModelConfig

if TYPE_CHECKING:
    from pipeline.models.base import LanguageModel
    from pipeline.models.documents import DocumentRule

MODELS = {
    "gpt": "pipeline.models.gpt:GptLM",
    "lstm_attention": "pipeline.models.lstm:LstmAttentionLM",
}
"""Family name to the class that builds it; importing this package loads no torch."""


def build_model(
    config: ModelConfig, vocab_size: int, seed: int, documents: "DocumentRule | None" = None
) -> "LanguageModel":
    """Build a model with fresh weights, in fp32 on the CPU.

    The weights are a function of config, vocabulary and seed alone: they come from one generator of
    their own, and the global random state is neither read nor changed.

    Args:
        config: Family and shape.
        vocab_size: Entries of the tokenizer; `config.vocab_size` may pad the table beyond it.
        seed: Seed of the initialisation.
        documents: What the model keeps within a document; None keeps nothing.

    Raises:
        ConfigError: The tokenizer has more entries than `config.vocab_size`.
    """
    import torch

    module, name = MODELS[config.family].split(":")
    family = getattr(import_module(module), name)
    rows = config.resolved_vocab_size(vocab_size)
    # Layers that allocate for real also fill themselves from the global generator.
    with torch.device("meta"):
        model: LanguageModel = family(config, rows)
    model.to_empty(device="cpu")
    model.initialize(torch.Generator().manual_seed(seed))
    model.documents = documents
    return model
