"""What a next token costs: order of the rounds, and state by the closed form."""

from typing import Any

from tests.probes.cases import ARMS, make_run, measure

PARAMS: dict[str, Any] = {
    "context_tokens": [8, 40], "batch_samples": [1, 3], "num_tokens": 2, "repeats": 2,
}  # fmt: skip
FIELDS = {
    label: {**ARMS[label], "vocab_size": 61, "max_positions": 16}
    for label in ("gpt", "lstm", "lstm_attention", "min_lstm", "input_feeding")
}


def test_every_arm_is_timed_in_turn_with_the_state_of_its_closed_form() -> None:
    params = {**PARAMS, "models": FIELDS}
    rows = measure("generation", params, {"gpt": make_run(FIELDS["gpt"])})
    arms = [
        (label, tokens, samples) for label in FIELDS for tokens in (8, 40) for samples in (1, 3)
    ]
    for number in range(2):
        order = [
            (row["label"], row["context_tokens"], row["batch_samples"])
            for row in rows
            if row["round"] == number
        ]
        assert order == (arms if number == 0 else arms[::-1])
    for row in rows:
        config = make_run(FIELDS[row["label"]]).model
        expected = config.generation_state_bytes(row["context_tokens"], 4)
        assert row["state_bytes"] == row["batch_samples"] * expected
        assert row["seconds_per_token"] > 0
        assert row["cpu_seconds_per_token"] > 0
        assert (row["threads"], row["num_tokens"]) == (1, 2)
        assert row["load_average"] >= 0
    states = {(r["label"], r["context_tokens"]): r["state_bytes"] for r in rows}
    assert states["lstm", 8] == states["lstm", 40]
    assert 5 * states["gpt", 8] == states["gpt", 40]
