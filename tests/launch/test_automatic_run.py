"""A dry run says which numbers a rule filled and which were stated; a search shows its trials."""

from pathlib import Path

from tests.launch.conftest import Cli


def test_a_dry_run_tells_filled_from_stated(tmp_path: Path, cli: Cli) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {family: gpt}\ntrain: {automatic: true}\n")
    arguments = ("train", config, "train.optimizer.beta2=0.95", f"output_dir={tmp_path}")
    tree = cli(*arguments, "--dry-run", "--json").tree
    assert tree["automatic"]["stated"] == {"optimizer.beta2": 0.95}
    filled = tree["automatic"]["by_rule"]
    train = tree["run"]["train"]
    assert filled["global_batch_tokens"] == train["global_batch_tokens"]
    assert filled["optimizer.learning_rate"] == train["optimizer"]["learning_rate"]
    assert set(train["filled_by_rule"]) == set(filled)
    lines = cli(*arguments, "--dry-run").out.splitlines()
    assert "stated: optimizer.beta2 0.95" in lines
    tokens = f"{train['total_tokens']:,}"
    assert any(f"total_tokens {tokens}" in x for x in lines if x.startswith("filled by rule: "))


def test_a_run_without_a_rule_says_nothing_about_it(tmp_path: Path, cli: Cli) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: {family: gpt}\n")
    shown = cli("init", config, "--dry-run", f"output_dir={tmp_path}")
    assert shown.code == 0
    assert "filled by rule" not in shown.out


def test_a_search_lists_every_trial_of_every_model(tmp_path: Path, cli: Cli) -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / "study" / "search.yaml"
    overrides = ("search.num_trials=4", f"output_dir={tmp_path}")
    tree = cli("study", path, *overrides, "--dry-run", "--json").tree
    names = [cell["name"] for cell in tree["cells"]]
    assert len(names) == 4 * 4
    assert names[:2] == ["gpt_14k-trial000", "lstm_14k-trial000"]
