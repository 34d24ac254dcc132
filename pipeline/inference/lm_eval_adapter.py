"""From one of our models to a model of lm-evaluation-harness, and from its tasks to scores.

`tandem` is its name there: `--model tandem --model_args path=RUN` once this module is imported, as
`python -m launch evaluate RUN --tasks TASK` does.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager

from pipeline.errors import ConfigError
from pipeline.inference.generate import GenerationConfig, generate
from pipeline.inference.open_model import open_model
from pipeline.inference.sampling import SamplingConfig
from pipeline.inference.scoring import (
    Window,
    require_causal,
    rolling_windows,
    score_greedy,
    score_windows,
)
from pipeline.inference.weights import LoadedModel

DEFAULT_NEW_TOKENS = 256
"""New tokens where a task names no limit, as in the harness's own `hf` model."""


@register_model("tandem")
class TandemLM(TemplateLM):  # type: ignore[misc]
    """A model of ours behind the interface of the harness.

    Contexts that are too long lose their beginning; an empty one is an end of document.
    """

    def __init__(
        self, path: str | None = None, loaded: LoadedModel | None = None, batch_size: int = 16
    ) -> None:
        """Load a model, or take a loaded one.

        Args:
            path: Run, checkpoint or exported directory.
            loaded: Instead of a path.
            batch_size: Texts computed at once.

        Raises:
            ConfigError: Neither is given, or the model is not causal.
        """
        super().__init__()
        if loaded is None:
            if path is None:
                raise ConfigError("the model tandem needs path=DIR, a run, checkpoint or export")
            loaded = open_model(Path(path))
        require_causal(loaded.model)
        self.loaded = loaded
        self.batch_size = int(batch_size)
        self.max_length = loaded.model.max_positions

    @property
    def eot_token_id(self) -> int:
        """The id that closes a document."""
        return self.loaded.codec.facts.end_of_document_id

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in the harness's caches."""
        return f"tandem-{self.loaded.codec.sha256[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Give the ids of a text; there are no special tokens to add."""
        return self.loaded.codec.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        windows = [
            Window(
                tokens=(context + continuation)[-(self.max_length + 1) :],
                num_scored=min(len(continuation), self.max_length),
            )
            for _, context, continuation in requests
        ]
        vocab_size = self.loaded.codec.facts.vocab_size
        scores = score_greedy(self.loaded.model, windows, self.batch_size, vocab_size)
        for (request, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request, score)
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Give the log-likelihood of whole texts, in windows that do not overlap, in nats."""
        windows: list[Window] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = [self.eot_token_id, *self.tok_encode(request.args[0])]
            # The harness's rule: each window scores all that it holds but its first token.
            own = list(rolling_windows(tokens, self.max_length, self.max_length))
            windows += own
            owners += [number] * len(own)
        totals = [0.0] * len(requests)
        scores = score_windows(self.loaded.model, windows, self.batch_size)
        for number, likelihoods in zip(owners, scores, strict=True):
            totals[number] += float(likelihoods.sum())
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until one of their stop strings, an end of document, or the limit.

        A request that is sampled draws by its number, so that repeats of one differ.
        """
        return [self._generate(number, *request.args) for number, request in enumerate(requests)]

    def _generate(self, number: int, context: str, options: Mapping[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        sampling = SamplingConfig(temperature=0.0)
        if options.get("do_sample") and options.get("temperature", 1.0) > 0.0:
            sampling = SamplingConfig(
                temperature=options.get("temperature", 1.0),
                top_k=options.get("top_k") or None,  # 0 turns it off there
                top_p=options.get("top_p"),
            )
        wanted = int(options.get("max_gen_toks", options.get("max_new_tokens", DEFAULT_NEW_TOKENS)))
        num_new = min(wanted, self.max_length - 1)
        prompt = self.tok_encode(context)[-(self.max_length - num_new) :]
        ids: list[int] = []
        text = ""
        for token in generate(
            self.loaded.model,
            [prompt],
            GenerationConfig(sampling=sampling, max_tokens=num_new, seed=number),
            vocab_size=self.loaded.codec.facts.vocab_size,
            end_id=self.eot_token_id,
        ):
            ids.append(token.token_id)
            text = self.loaded.codec.decode(ids)
            if any(stop in text for stop in stops if stop):
                break
        for stop in filter(None, stops):
            text = text.split(stop)[0]
        self.cache_hook.add_partial("generate_until", (context, options), text)
        return text


def evaluate_tasks(
    loaded: LoadedModel, tasks: Sequence[str], include: Path | None, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Score a model on tasks of lm-evaluation-harness.

    Args:
        loaded: Model and tokenizer.
        tasks: Names that the harness knows, or finds in `include`.
        include: A directory with task files of your own.
        limit: Examples of each task; None takes all.

    Returns:
        Scores by task and metric.

    Raises:
        ConfigError: A task is unknown.
    """
    manager = find_tasks(tasks, include)
    answer = evaluator.simple_evaluate(
        model=TandemLM(loaded=loaded),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        log_samples=False,
        bootstrap_iters=0,
    )
    return {name: _plain(scores.items()) for name, scores in answer["results"].items()}


def find_tasks(tasks: Sequence[str], include: Path | None) -> TaskManager:
    """Give the index in which all tasks stand; reading the harness's own takes seconds.

    Raises:
        ConfigError: A task is in neither.
    """
    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if not unknown_tasks(own, tasks):
            return own
    manager = TaskManager(include_path=str(include) if include is not None else None)
    check_tasks(manager, tasks)
    return manager


def check_tasks(manager: TaskManager, tasks: Sequence[str]) -> None:
    """Refuse tasks that an index lacks.

    Raises:
        ConfigError: It lacks some; they are named.
    """
    if unknown := unknown_tasks(manager, tasks):
        raise ConfigError(
            f"lm-evaluation-harness knows no task {', '.join(unknown)}; list them with "
            "`lm_eval ls tasks`, or name a directory of your own with --include"
        )


def unknown_tasks(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    """List the tasks that an index lacks."""
    return [name for name in tasks if not manager.match_tasks([name])]


def _plain(scores: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Keep what can be read as a number; metrics are named `metric,filter` there."""
    return {name: value for name, value in scores if isinstance(value, int | float)}
