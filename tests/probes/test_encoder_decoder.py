"""The encoder-decoder against its published equations, and what attention gives it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.probes.bahdanau import EncoderDecoder
from pipeline.probes.encoder_decoder import TranslationLearner
from pipeline.probes.task_memory import CopyString
from tests.probes.cases import GPT, make_run, measure


def make(attends: bool) -> EncoderDecoder:
    model = EncoderDecoder(29, 6, attends=attends)
    model.initialize(torch.Generator().manual_seed(0))
    return model.eval()


def gru_step(cell: torch.nn.Module, x_D: Tensor, state_H: Tensor, suffix: str = "") -> Tensor:
    """Source: Cho et al. 2014, in torch's form, where the reset acts after the product."""
    weights = {
        name: cell.get_parameter(name + suffix)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    reset, update, new = (weights["weight_ih"] @ x_D + weights["bias_ih"]).chunk(3)
    old_reset, old_update, old_new = (weights["weight_hh"] @ state_H + weights["bias_hh"]).chunk(3)
    keep_H = (update + old_update).sigmoid()
    new_H = (new + (reset + old_reset).sigmoid() * old_new).tanh()
    return keep_H * state_H + (1 - keep_H) * new_H


@torch.no_grad()
def translate_by_loops(model: EncoderDecoder, source: list[int], target: list[int]) -> Tensor:
    """Source: Bahdanau et al. 2015, appendix A; the output layer linear."""
    letters = [model.embedding.weight[token] for token in source]
    forward, backward = [torch.zeros(6)], [torch.zeros(6)]
    for x_D in letters:
        forward.append(gru_step(model.encoder, x_D, forward[-1], "_l0"))
    for x_D in reversed(letters):
        backward.append(gru_step(model.encoder, x_D, backward[-1], "_l0_reverse"))
    states = [torch.cat(pair) for pair in zip(forward[1:], reversed(backward[1:]), strict=True)]
    state_H = (model.start.weight @ backward[-1] + model.start.bias).tanh()
    logits = []
    for token in target:
        context_C = torch.cat((forward[-1], backward[-1]))
        if model.attends:
            scores = [
                model.score_A @ (model.query.weight @ state_H + model.key.weight @ state_C).tanh()
                for state_C in states
            ]
            weights = torch.stack(scores).softmax(0)
            context_C = sum(w * s for w, s in zip(weights, states, strict=True))  # type: ignore
        read_D = torch.cat((model.embedding.weight[token], context_C))
        state_H = gru_step(model.decoder, read_D, state_H)
        logits.append(model.out.weight @ torch.cat((state_H, read_D)) + model.out.bias)
    return torch.stack(logits)


@pytest.mark.parametrize("attends", [True, False])
def test_the_network_is_the_published_one(attends: bool) -> None:
    model = make(attends)
    source, target = [3, 1, 20, 7], [27, 5, 6]
    with torch.no_grad():
        logits_TV = model(torch.tensor([source]), torch.tensor([target]))[0]
    assert torch.allclose(logits_TV, translate_by_loops(model, source, target), atol=1e-5)
    written = model.decode(torch.tensor([source]), 27, 3)[0].tolist()
    # Writing is reading its own last token.
    with torch.no_grad():
        again_TV = model(torch.tensor([source]), torch.tensor([[27, *written[:2]]]))[0]
    assert again_TV.argmax(dim=1).tolist() == written


def test_the_second_string_of_the_task_is_what_the_decoder_says() -> None:
    task = CopyString(backwards=True)
    examples = task.draw(2, 3, np.random.default_rng(0))
    learner = TranslationLearner(make(True), torch.device("cpu"))
    source_BS, target_BT, labels_BT = learner._tensors(examples)
    assert torch.equal(labels_BT[:, :3], source_BS.flip(1))
    assert labels_BT[:, 3].tolist() == [28, 28]
    assert torch.equal(target_BT[:, 1:], labels_BT[:, :3])
    assert target_BT[:, 0].tolist() == [27, 27]


def test_attention_learns_to_copy_what_a_summary_does_not_hold() -> None:
    params: dict[str, Any] = {
        "learning_rates": [2e-2], "max_steps": 60, "batch_samples": 32, "test_samples": 64,
        "evaluate_every_steps": 60, "width": 16, "train_lengths": [5, 5], "test_lengths": [5, 8],
    }  # fmt: skip
    records = measure("encoder_decoder", params, {"gpt": make_run(GPT)})
    losses = {r["label"]: r["loss"] for r in records if r["kind"] == "training"}
    assert losses["with_attention"] < losses["without_attention"] - 0.4
    trials = [(r["label"], r["value"]) for r in records if r["kind"] == "trial"]
    assert trials == [(label, n) for label in losses for n in (5, 8)]
    assert {r["task"] for r in records} == {"copy_string"}
    # 64 strings of 8 letters, each with its full stop.
    assert {r["num_answers"] for r in records if r.get("value") == 8} == {64 * 9}
    unseen = [r["unseen_length_accuracy"] for r in records if r["kind"] == "training"]
    assert unseen == [r["accuracy"] for r in records if r.get("value") == 8]
