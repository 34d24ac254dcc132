"""Questions come from held-out documents alone, and their right answer is what follows."""

import pytest

from pipeline.data.make_shards import is_validation
from tests.bench.corpora import CorpusDocument
from tests.bench.word_order_task import NUM_CHOICES, cut_question, make_questions

FRACTION = 0.5


def document(number: int) -> CorpusDocument:
    sentences = [
        f"Sentence {i} of document {number} tells of one more day at sea." for i in range(30)
    ]
    return CorpusDocument(id=f"novels/{number}", text=" ".join(sentences), rest="")


def test_the_right_answer_follows_the_question_in_a_held_out_document() -> None:
    documents = [document(number) for number in range(40)]
    held_out = [d.text for d in documents if is_validation(d.id, FRACTION)]
    trained = [d.text for d in documents if not is_validation(d.id, FRACTION)]
    questions = make_questions(documents, FRACTION, limit=100, seed=3)
    assert len(questions) == len(held_out)
    assert 0 < len(trained) < len(documents)
    for question in questions:
        right = question["choices"][question["gold"]]
        assert any(f"{question['question']} {right}" in text for text in held_out)
        assert len(set(question["choices"])) == NUM_CHOICES
        words = {tuple(sorted(choice.split())) for choice in question["choices"]}
        assert len(words) == 1
        assert not any(question["question"] in text for text in trained)
    assert len({question["gold"] for question in questions}) == NUM_CHOICES


@pytest.mark.parametrize("text", ["", "Short. Text. Of few. Words.", "no sentence ends here " * 90])
def test_a_text_without_a_sentence_to_follow_gives_no_question(text: str) -> None:
    assert cut_question(text) is None
