"""What attention gave an encoder-decoder when it was first published: accuracy against length.

The same network with and without attention learns to copy strings of letters, or to reverse them,
in the loop that all synthetic tasks share, and is tested by letting it write on its own.

Shapes: `B` examples, `S` letters, `T` = S + 1 tokens of the answer, `V` vocabulary.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.schema import RunConfig
from pipeline.probes.arms import share_out
from pipeline.probes.bahdanau import EncoderDecoder
from pipeline.probes.context import ProbeContext
from pipeline.probes.settings import EncoderDecoderParams
from pipeline.probes.synthetic_task import describe_fit, score_trials, score_unseen
from pipeline.probes.task_base import Examples
from pipeline.probes.task_memory import CopyString
from pipeline.probes.task_training import Score, fit_task

LABELS = {"with_attention": True, "without_attention": False}


class TranslationLearner:
    """An encoder-decoder on the task of copying: the first string is its source."""

    def __init__(self, model: EncoderDecoder, device: torch.device) -> None:
        self.module: nn.Module = model
        self._model, self._device = model, device

    def loss(self, examples: Examples) -> Tensor:
        """Give the mean loss of the answer, each token of it given those before."""
        source_BS, target_BT, labels_BT = self._tensors(examples)
        logits_BTV = self._model(source_BS, target_BT)
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())

    @torch.no_grad()
    def score(self, examples: Examples) -> Score:
        """Score the answer that the model writes on its own."""
        source_BS, target_BT, labels_BT = self._tensors(examples)
        begin = int(target_BT[0, 0])
        right_BT = self._model.decode(source_BS, begin, labels_BT.shape[1]) == labels_BT
        return Score(
            loss=float(self.loss(examples)),
            accuracy=float(right_BT.double().mean()),
            sequence_accuracy=float(right_BT.all(dim=1).double().mean()),
            num_answers=right_BT.numel(),
        )

    def _tensors(self, examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """Give source, what the decoder reads, and what it is to say, of `$ s | s .`."""
        inputs_BT = torch.from_numpy(examples.inputs).to(self._device)
        labels_BT = torch.from_numpy(examples.labels).to(self._device)
        length = (inputs_BT.shape[1] - 2) // 2
        return inputs_BT[:, 1 : length + 1], inputs_BT[:, length + 1 :], labels_BT[:, length + 1 :]


def run(runs: Mapping[str, RunConfig], context: ProbeContext) -> list[dict[str, Any]]:
    """Train and test both networks.

    Args:
        runs: Not read; the networks are the probe's own.
        context: Rank group and arguments.

    Returns:
        Records as those of the synthetic-task probe, with the task `copy_string` or
        `reverse_string` and the labels `with_attention` and `without_attention`.

    Raises:
        ConfigError: An argument is illegal.
    """
    del runs
    params = context.parse_params(EncoderDecoderParams)
    task = CopyString(
        train_lengths=params.train_lengths,
        test_lengths=params.test_lengths,
        backwards=params.backwards,
    )
    name = "reverse_string" if params.backwards else "copy_string"

    def measure(job: tuple[str, float, int]) -> list[dict[str, Any]]:
        label, rate, seed = job
        context.on_event(f"train {label} on {name}, learning rate {rate:g}, seed {seed}")
        model = EncoderDecoder(task.vocab_size, params.width, attends=LABELS[label])
        model.initialize(torch.Generator().manual_seed(seed))
        learner = TranslationLearner(model.to(context.ranks.device), context.ranks.device)
        fit = fit_task(learner, task, params, rate, seed)
        trials = list(score_trials(learner, task, params))
        first = {
            "kind": "training", **describe_fit(fit, params), **score_unseen(trials, task),
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "chance_accuracy": task.chance_accuracy,
        }  # fmt: skip
        curve = [{"kind": "curve", "step": p.step, **p.score.columns} for p in fit.points]
        columns = {"task": name, "label": label, "learning_rate": rate, "seed": seed}
        return [{**columns, **row} for row in (first, *curve, *trials)]

    jobs = list(itertools.product(LABELS, params.learning_rates, params.seeds))
    return share_out(jobs, context.ranks, measure)
