"""From held-out documents of a corpus to a small task of lm-evaluation-harness: what follows?

    python -m tests.bench.continuation_task --corpus DIR --fraction 0.02 --output TASKS
    python -m launch evaluate RUN --tasks tandem_continuation --include TASKS

Each question is the beginning of a document that a run with this `data.validation_fraction` never
trained on; the choices are the sentence that follows and three from other held-out documents of the
same kind (the id's part before the first slash). Chance is 0.25. No network is needed.
"""

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.make_shards import is_validation
from tests.bench.corpora import CorpusDocument, read_corpus

TASK = "tandem_continuation"
NUM_CHOICES = 4
CONTEXT_CHARACTERS = 600
SENTENCE_CHARACTERS = (40, 240)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

TASK_FILE = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def cut_question(text: str) -> tuple[str, str] | None:
    """Cut the beginning of a text and the sentence behind it; None where there is none."""
    beginning = SENTENCE_END.split(text[: 4 * CONTEXT_CHARACTERS])[:-1]
    context = ""
    for sentence in beginning:
        sentence = " ".join(sentence.split())
        low, high = SENTENCE_CHARACTERS
        if len(context) >= CONTEXT_CHARACTERS and low <= len(sentence) <= high:
            return context, sentence
        context = f"{context} {sentence}".strip()
    return None


def make_questions(
    documents: Sequence[CorpusDocument], fraction: float, limit: int, seed: int
) -> list[dict[str, Any]]:
    """Make one question of each held-out document that is long enough.

    Args:
        documents: The corpus.
        fraction: `data.validation_fraction` of the runs that will answer.
        limit: Most questions.
        seed: Of the order of documents, the wrong sentences and the places of the right ones.
    """
    draw = random.Random(seed)
    cut: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for document in documents:
        if is_validation(document.id, fraction) and (question := cut_question(document.text)):
            cut[document.id.partition("/")[0]].append(question)
    questions = []
    for pairs in cut.values():
        for number, (context, right) in enumerate(pairs):
            others = [sentence for other, (_, sentence) in enumerate(pairs) if other != number]
            if len(set(others) - {right}) < NUM_CHOICES - 1:
                continue
            choices = draw.sample(sorted(set(others) - {right}), NUM_CHOICES - 1)
            gold = draw.randrange(NUM_CHOICES)
            choices.insert(gold, right)
            questions.append({"question": context, "choices": choices, "gold": gold})
    draw.shuffle(questions)
    return questions[:limit]


def write_task(questions: Sequence[dict[str, Any]], directory: Path) -> None:
    """Write the task and its data; the harness wants the path of the data absolute."""
    directory.mkdir(parents=True, exist_ok=True)
    data = (directory / f"{TASK}.jsonl").absolute()
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (directory / f"{TASK}.yaml").write_text(TASK_FILE.format(task=TASK, data=data))


def main() -> None:
    """Write the task; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--fraction", type=float, default=0.02)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    documents = read_corpus(given.corpus)
    questions = make_questions(documents, given.fraction, given.limit, given.seed)
    write_task(questions, given.output)
    print(f"{len(questions)} questions in {given.output}")


if __name__ == "__main__":
    main()
