"""Exports beside the models that they came from, read by `transformers` and by our own loader."""

import ast
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.data import TokenizerConfig
from pipeline.config.gpt import GptConfig
from pipeline.config.lstm import LstmConfig
from pipeline.config.model import ModelConfig
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.errors import CheckpointError, ConfigError
from pipeline.inference.export import export_model, plan_export
from pipeline.inference.exported import load_export
from pipeline.inference.generate import GenerationConfig, generate
from pipeline.inference.own_sources import flat_sources
from pipeline.inference.sampling import SamplingConfig
from pipeline.inference.text import TextCodec
from pipeline.inference.weights import LoadedModel
from pipeline.models import MODELS, build_model
from tests.inference.cases import END, TEXTS, spread_logits, tiny_tokenizer

FACTS = tiny_tokenizer()
SMALL: dict[str, Any] = {"width": 16, "depth": 2, "heads": 4, "max_positions": 48}
GPT2_FIELDS = {
    "positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "biases": True,
}  # fmt: skip
CONFIGS: dict[str, tuple[ModelConfig, str]] = {
    "default gpt": (GptConfig(**SMALL), "llama"),
    "grouped, untied, padded": (
        GptConfig(**SMALL, kv_heads=2, tied_head=False, vocab_size=301, rope_base=5e4), "llama",
    ),
    "gpt2": (GptConfig(**SMALL, **GPT2_FIELDS), "gpt2"),
    "window and alibi": (
        GptConfig(**SMALL, positions="alibi", window_tokens=7, qk_norm=True), "tandem",
    ),
    "lstm": (LstmConfig(**SMALL), "tandem"),
    "lstm without attention": (LstmConfig(**SMALL, attention="none"), "tandem"),
    "input feeding": (
        LstmConfig(**SMALL, cell="gru", attention="additive", input_feeding=True), "tandem",
    ),
    "parallel": (LstmConfig(**SMALL, cell="min_lstm"), "tandem"),
}  # fmt: skip


def build_loaded(config: ModelConfig) -> LoadedModel:
    model = build_model(config, FACTS.vocab_size, seed=5)
    spread_logits(model)
    return LoadedModel(model=model.eval(), codec=TextCodec(FACTS, END))


@pytest.fixture(params=list(CONFIGS))
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LoadedModel, str, Path]:
    config, kind = CONFIGS[request.param]
    loaded = build_loaded(config)
    plan = plan_export(config, "auto")
    assert plan.format == kind
    target = tmp_path / "gpt-export"
    export_model(loaded, config, plan, target)
    return loaded, kind, target


def their_model(kind: str, directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        str(directory), trust_remote_code=kind == "tandem", local_files_only=True
    ).eval()


def test_transformers_gives_equal_logits_and_tokens(
    exported: tuple[LoadedModel, str, Path],
) -> None:
    loaded, kind, directory = exported
    theirs = their_model(kind, directory)
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    assert tokenizer.eos_token == END
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == FACTS.end_of_document_id
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == loaded.codec.encode(text)
        assert tokenizer.decode(ids) == text
        inputs_BT = torch.tensor([ids[:48]])
        with torch.no_grad():
            torch.testing.assert_close(
                theirs(inputs_BT).logits, loaded.model.logits(inputs_BT), rtol=0, atol=1e-5
            )


def test_transformers_generates_the_same_text(exported: tuple[LoadedModel, str, Path]) -> None:
    loaded, kind, directory = exported
    prompt = loaded.codec.encode("The old moon")
    ours = generate(
        loaded.model,
        [prompt],
        GenerationConfig(sampling=SamplingConfig(temperature=0), max_tokens=12),
        vocab_size=FACTS.vocab_size,
        end_id=FACTS.end_of_document_id,
    )
    theirs = their_model(kind, directory).generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
        pad_token_id=FACTS.end_of_document_id,
    )  # fmt: skip
    assert [token.token_id for token in ours] == theirs[0, len(prompt) :].tolist()


def test_our_own_loader_gives_the_same_model(exported: tuple[LoadedModel, str, Path]) -> None:
    loaded, _, directory = exported
    again = load_export(directory)
    found = dict(again.model.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(found[name], parameter), name
    assert again.codec.facts.end_of_document_id == FACTS.end_of_document_id
    assert [again.codec.encode(t) for t in TEXTS] == [loaded.codec.encode(t) for t in TEXTS]


@pytest.mark.parametrize("kind", ["llama", "tandem"])
def test_rows_beyond_the_tokenizer_are_not_drawn_by_transformers(kind: Any, tmp_path: Path) -> None:
    config, _ = CONFIGS["grouped, untied, padded"]
    loaded = build_loaded(config)
    with torch.no_grad():
        # Without a rule against it one of two opposite rows would be the likeliest by far.
        loaded.model.head_VD[FACTS.vocab_size] = loaded.model.head_VD[5] * 30
        loaded.model.head_VD[-1] = loaded.model.head_VD[5] * -30
    export_model(loaded, config, plan_export(config, kind), tmp_path / "padded")
    theirs = their_model(kind, tmp_path / "padded")
    prompt = torch.tensor([loaded.codec.encode("The old moon")])
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(prompt).logits, loaded.model.logits(prompt), rtol=0, atol=1e-4
        )
    assert int(loaded.model.logits(prompt)[0, -1].argmax()) >= FACTS.vocab_size
    drawn = theirs.generate(prompt, max_new_tokens=20, do_sample=True, min_new_tokens=20)
    assert drawn.shape[1] == prompt.shape[1] + 20
    assert int(drawn.max()) < FACTS.vocab_size


def test_a_tokenizer_that_adds_tokens_is_exported_without_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(FACTS.tokenizer_json)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, FACTS.end_of_document_id)]
    )
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    codec = TextCodec(load_tokenizer(tmp_path / "tokenizer.json", END), END)
    config, _ = CONFIGS["default gpt"]
    loaded = LoadedModel(model=build_loaded(config).model, codec=codec)
    export_model(loaded, config, plan_export(config, "auto"), tmp_path / "exported")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "exported"), local_files_only=True)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == codec.encode(text)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    config, _ = CONFIGS["default gpt"]
    export_model(build_loaded(config), config, plan_export(config, "auto"), tmp_path / "gpt")
    larger = train_tokenizer([" ".join(TEXTS)], TokenizerConfig(vocab_size=295))
    rows = FACTS.vocab_size
    assert larger.vocab_size > rows
    (tmp_path / "gpt" / "tokenizer.json").write_text(larger.tokenizer_json)
    message = rf"tokenizer\.json .* needs {larger.vocab_size} rows; .*vocab_size={rows}"
    with pytest.raises(CheckpointError, match=message):
        load_export(tmp_path / "gpt")


def test_what_transformers_saves_is_loaded(tmp_path: Path) -> None:
    config, _ = CONFIGS["grouped, untied, padded"]
    loaded = build_loaded(config)
    export_model(loaded, config, plan_export(config, "llama"), tmp_path / "first")
    theirs = their_model("llama", tmp_path / "first")
    theirs.save_pretrained(str(tmp_path / "second"))
    AutoTokenizer.from_pretrained(str(tmp_path / "first")).save_pretrained(str(tmp_path / "second"))
    again = load_export(tmp_path / "second")
    assert torch.equal(again.model.embedding_VD, loaded.model.embedding_VD)
    assert again.codec.encode(TEXTS[2]) == loaded.codec.encode(TEXTS[2])


def test_an_exported_module_refuses_texts_filled_up_in_front(tmp_path: Path) -> None:
    config, _ = CONFIGS["lstm"]
    export_model(build_loaded(config), config, plan_export(config, "auto"), tmp_path / "lstm")
    theirs = their_model("tandem", tmp_path / "lstm")
    inputs_BT = torch.tensor([[0, 5, 6], [7, 8, 9]])
    with pytest.raises(ValueError, match="padding_side='right'"):
        theirs(inputs_BT, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
    short = theirs(inputs_BT[:1, :2]).logits
    padded = theirs(inputs_BT, attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]])).logits
    torch.testing.assert_close(padded[:1, :2], short, rtol=0, atol=1e-6)
    with torch.no_grad():
        loss = theirs(inputs_BT, labels=inputs_BT).loss
        expected = build_loaded(config).model(inputs_BT[:, :-1], inputs_BT[:, 1:]).mean()
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "tandem"])
def test_what_the_tokenizer_gives_is_generated_from(kind: Any, tmp_path: Path) -> None:
    config, _ = CONFIGS["gpt2"]
    loaded = build_loaded(config)
    export_model(loaded, config, plan_export(config, kind), tmp_path / "exported")
    theirs = their_model(kind, tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "exported"), local_files_only=True)
    inputs = tokenizer("The old moon", return_tensors="pt")
    found = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)
    prompt = loaded.codec.encode("The old moon")
    greedy = GenerationConfig(sampling=SamplingConfig(temperature=0), max_tokens=8)
    ours = generate(
        loaded.model, [prompt], greedy, vocab_size=FACTS.vocab_size,
        end_id=FACTS.end_of_document_id,
    )  # fmt: skip
    assert found[0].tolist() == [*prompt, *(token.token_id for token in ours)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_exported_module_continues_no_prompts_that_are_filled_up(
    side: str, tmp_path: Path
) -> None:
    config, _ = CONFIGS["lstm"]
    export_model(build_loaded(config), config, plan_export(config, "auto"), tmp_path / "lstm")
    tokenizer = AutoTokenizer.from_pretrained(
        str(tmp_path / "lstm"), local_files_only=True, padding_side=side
    )
    inputs = tokenizer(["The old moon", "A"], return_tensors="pt", padding=True)
    with pytest.raises(ValueError, match="must have equally many"):
        their_model("tandem", tmp_path / "lstm").generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize(
    ("config", "wanted", "fields"),
    [
        (GptConfig(**SMALL, positions="learned"), "llama", ["model.positions=learned"]),
        (GptConfig(**SMALL), "gpt2", ["model.positions=rope", "model.norm=rmsnorm",
                                      "model.activation=swiglu", "model.biases=False"]),
        (GptConfig(**SMALL, qk_norm=True, window_tokens=4), "llama",
         ["model.qk_norm=True", "model.window_tokens=4"]),
        (GptConfig(**SMALL, causal=False), "llama", ["model.causal=False"]),
        (LstmConfig(**SMALL), "llama", ["model.family=lstm_attention"]),
    ],
)  # fmt: skip
def test_a_model_that_an_architecture_cannot_express_is_refused_by_field(
    config: ModelConfig, wanted: Any, fields: list[str]
) -> None:
    with pytest.raises(ConfigError, match="--format tandem") as refusal:
        plan_export(config, wanted)
    for field in fields:
        assert field in str(refusal.value)


def test_a_directory_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("keep")
    config, _ = CONFIGS["default gpt"]
    with pytest.raises(ConfigError, match="not empty"):
        export_model(build_loaded(config), config, plan_export(config, "auto"), tmp_path / "mine")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "note"]


def test_a_damaged_export_is_refused_by_file_and_tensor(tmp_path: Path) -> None:
    config, _ = CONFIGS["default gpt"]
    good = tmp_path / "good"
    export_model(build_loaded(config), config, plan_export(config, "auto"), good)
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    text = (good / "config.json").read_text()
    (bad / "config.json").write_text(text.replace('"hidden_size": 16', '"hidden_size": 32'))
    with pytest.raises(CheckpointError, match="head_dim"):
        load_export(bad)
    (bad / "config.json").write_text(text.replace('_layers": 2', '_layers": 3'))
    with pytest.raises(CheckpointError, match=r"layers\.2\.\S+ is missing"):
        load_export(bad)
    (bad / "config.json").write_text(
        text.replace('"intermediate_size": 40', '"intermediate_size": 48')
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .* has shape \[40, 16"):
        load_export(bad)
    (bad / "config.json").write_text(text.replace('_layers": 2', '_layers": 1000000'))
    with pytest.raises(CheckpointError, match=r"config\.json describes a model of [\d,]{13,} para"):
        load_export(bad)
    for vocab_size in ("-3", '"9"', "2.5"):
        (bad / "config.json").write_text(
            f'{{"model_type": "tandem", "tandem": {{"family": "gpt"}}, "vocab_size": {vocab_size}}}'
        )
        with pytest.raises(CheckpointError, match=r"config\.json: vocab_size=.*legal: whole"):
            load_export(bad)
    (bad / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_export(bad)
    (bad / "config.json").write_text(" " * (2 << 20))
    with pytest.raises(CheckpointError, match="at most 1048576 bytes"):
        load_export(bad)


def test_the_sources_beside_an_export_are_ours_and_need_nothing_else() -> None:
    sources = flat_sources("inference.modeling_tandem")
    assert "modeling_tandem.py" in sources
    for name, text in sources.items():
        assert "pipeline." not in "".join(
            line for line in text.splitlines() if line.lstrip().startswith(("import", "from"))
        ), name
        assert third_party(text) <= {"torch", "pydantic", "transformers"}, name
    for target in MODELS.values():
        module = target.partition(":")[0].removeprefix("pipeline.").replace(".", "_")
        assert f"tandem_{module}.py" in sources, "a family is missing from modeling_tandem"


def third_party(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 0}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names
