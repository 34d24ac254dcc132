"""From an exported directory to a model in `transformers`: our own models behind its classes.

`export` writes this file and the sources that it imports beside the weights, word for word but for
the imports, so what is exported is what was trained.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from pipeline.config.gpt import GptConfig
from pipeline.config.lstm import LstmConfig
from pipeline.models.base import LanguageModel
from pipeline.models.gpt import GptLM
from pipeline.models.lstm import LstmAttentionLM


class TandemConfig(PretrainedConfig):  # type: ignore[misc]
    """The config.json of an exported model; `tandem` holds the config that it was trained with."""

    model_type = "tandem"

    def __init__(self, tandem: dict[str, Any] | None = None, **fields: Any) -> None:
        self.tandem = tandem
        super().__init__(**fields)


class TandemForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """One of our language models; generation has no cache and reads all text for each token."""

    config_class = TandemConfig
    base_model_prefix = "model"

    def __init__(self, config: TandemConfig) -> None:
        super().__init__(config)
        self.model = build(config.tandem or {}, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Leave weights as they are: they come from the file, and none may be missing there."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutput:
        """Give logits, and with labels the mean loss in nats per token.

        Args:
            input_ids: Token ids `[B, T]`.
            attention_mask: 0 where a text is filled up; only behind its end.
            labels: `input_ids` or -100 `[B, T]`, shifted here, as `transformers` does.
            unused: What generation passes to models with a cache.

        Raises:
            ValueError: A text is filled up in front.
        """
        if attention_mask is not None and bool((attention_mask.diff(dim=-1) > 0).any()):
            raise ValueError(
                "attention_mask begins with 0: this model reads from the first token on, so texts "
                "are to be filled up behind their end (padding_side='right')"
            )
        logits_BTV = self.model(input_ids)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(
                logits_BTV[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            )
        return CausalLMOutput(loss=loss, logits=logits_BTV)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        """Give the whole text again: there is no cache.

        `attention_mask` stands here by name because `transformers` refuses what neither this
        function names nor it itself knows, and every tokenizer gives one.

        Raises:
            ValueError: A prompt is filled up, so that new tokens would follow the filling.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError(
                "attention_mask holds 0: this model reads every token of a prompt, so prompts that "
                "are continued together must have equally many; continue others one by one"
            )
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def build(tree: dict[str, Any], vocab_rows: int) -> LanguageModel:
    """Build the model that a config names, its weights not yet set."""
    if tree.get("family") == "lstm_attention":
        return LstmAttentionLM(LstmConfig.model_validate(tree), vocab_rows)
    return GptLM(GptConfig.model_validate(tree), vocab_rows)
