"""From held-out documents to a small task of lm-evaluation-harness: which sentence was written?

    python -m tests.bench.word_order_task --corpus DIR --fraction 0.02 --output TASKS
    python -m launch evaluate RUN --tasks tandem_word_order --include TASKS

Each question is the beginning of a document that a run with this `data.validation_fraction` never
trained on; the choices are the sentence that follows and three copies of it, in each of which two
neighbouring words have changed places, so that all have the same words and length. Chance is 0.25.
No network is needed.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.make_shards import is_validation
from tests.bench.corpora import CorpusDocument, read_corpus

TASK = "tandem_word_order"
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


def swap_neighbours(sentence: str, draw: random.Random, num_copies: int) -> list[str] | None:
    """Give copies of a sentence with two neighbouring words exchanged; None if it has too few."""
    words = sentence.split()
    places = [i for i in range(len(words) - 1) if words[i].lower() != words[i + 1].lower()]
    if len(places) < num_copies:
        return None
    copies = []
    for place in draw.sample(places, num_copies):
        before, (first, second), after = words[:place], words[place : place + 2], words[place + 2 :]
        copies.append(" ".join([*before, second, first, *after]))
    return copies


def make_questions(
    documents: Sequence[CorpusDocument], fraction: float, limit: int, seed: int
) -> list[dict[str, Any]]:
    """Make one question of each held-out document that is long enough.

    Args:
        documents: The corpus.
        fraction: `data.validation_fraction` of the runs that will answer.
        limit: Most questions.
        seed: Of the order of documents, the places exchanged and those of the right answers.
    """
    draw = random.Random(seed)
    questions = []
    for document in documents:
        if not is_validation(document.id, fraction):
            continue
        cut = cut_question(document.text)
        choices = swap_neighbours(cut[1], draw, NUM_CHOICES - 1) if cut else None
        if cut is None or choices is None:
            continue
        gold = draw.randrange(NUM_CHOICES)
        choices.insert(gold, cut[1])
        questions.append({"question": cut[0], "choices": choices, "gold": gold})
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
