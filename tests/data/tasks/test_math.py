"""GSM8K and MetaMathQA: what is learnt, what is held out, and how an answer is found and judged."""

import gzip
import json
import re

import pytest

from stablelora_jax import InputError
from stablelora_jax.config.run import MathTask
from stablelora_jax.data.tasks import gsm8k, load_questions, metamathqa
from tests.data.tasks.test_arc import write

ROW = {"question": "Two and two?", "answer": "It is 2+2=<<2+2=4>>4.\n#### 1,004"}
META = {"type": "GSM_AnsAug", "query": "How many?", "original_question": "Two?", "response": "4.\nThe answer is: 4"}


def test_a_problem():
    assert gsm8k.problem(ROW, "p") == (
        "Question: Two and two?\nAnswer:",
        " It is 2+2=4.\n#### 1,004",
        "1004",
        "p",
    )
    assert metamathqa.problem(META, "p") == ("Question: How many?\nAnswer:", " 4.\nThe answer is: 4", "4", "p")


@pytest.mark.parametrize("answer", ["", "It is 4.", "It is 4.\n#### ", None])
def test_an_answer_without_its_end_is_refused(tmp_path, answer):
    write(tmp_path, [ROW, {**ROW, "answer": answer}])
    with pytest.raises(InputError, match="row 2 is damaged"):
        gsm8k.problems("train", str(tmp_path))
    write(tmp_path, [META, {**META, "response": answer}])
    with pytest.raises(InputError, match="row 2 is damaged"):
        metamathqa.problems("train", str(tmp_path))


@pytest.mark.parametrize(
    "said,strict,flexible",
    [
        ("so 5 + 5 = 10.\n#### 10", "10", "10"),
        ("#### -3,000.5 and #### 7", "-3,000.5", "7"),
        ("that is $1,234.00.", "[invalid]", "$1,234.00."),
        ("9", "[invalid]", "9"),
        ("no number", "[invalid]", "[invalid]"),
        ("", "[invalid]", "[invalid]"),
    ],
)
def test_extraction(said, strict, flexible):
    assert gsm8k.extracted(said) == {"strict-match": strict, "flexible-extract": flexible}


def test_exact_match():
    for same in ("1004", "1,004", "$1004", "1004.", "steps\n#### 1004"):
        assert gsm8k.exact_match(same, "1004") == 1.0
    for other in ("1004.0", "104", "", "[invalid]"):
        assert gsm8k.exact_match(other, "1004") == 0.0


def test_real_gsm8k(shared):
    path = str(shared("data/gsm8k"))
    rows = [json.loads(row) for row in shared("data/gsm8k/test.jsonl").read_text().strip().split("\n")]
    problems = gsm8k.problems("test", path)
    assert [p.target for p in problems] == [row["final"] for row in rows]
    assert not any("<<" in p.answer or ">>" in p.answer for p in problems)
    for row, p in zip(rows, problems, strict=True):
        assert gsm8k.exact_match(gsm8k.extracted(p.answer)["strict-match"], str(p.target)) == 1.0
        assert p.answer.split() == re.sub("<<.*?>>", "", row["answer"]).split()


def test_held_out(shared):
    path = str(shared("data/gsm8k"))
    whole, train, validation = (
        gsm8k.problems("train", path, held_out=False),
        gsm8k.problems("train", path),
        gsm8k.problems("validation", path),
    )
    assert len(whole) == 7473 and sorted(whole) == sorted(train + validation)
    assert 60 < len(validation) < 240
    assert load_questions(MathTask("gsm8k", path=path, validation_limit=9), "validation") == validation[:9]
    with pytest.raises(InputError, match="nothing is held out"):
        gsm8k.problems("validation", path, held_out=False)
    with pytest.raises(InputError, match="no split 'test'"):
        metamathqa.problems("test", path)


def test_real_metamathqa(shared, tmp_path):
    real = shared("data/metamath_standin/metamathqa_real_rows_quoted.jsonl")
    (tmp_path / "train.jsonl").write_bytes(real.read_bytes())
    problems = metamathqa.problems("train", str(tmp_path), held_out=False)
    assert [p.target for p in problems] == ["\\sqrt{5}", "752", "240", "1200"]
    for p in problems[1:]:
        assert gsm8k.extracted(p.answer) == {"strict-match": p.target, "flexible-extract": p.target}


def test_rephrased_questions_stay_on_one_side(shared, tmp_path):
    standin = shared("data/metamath_standin/gsm8k_train_in_metamathqa_schema.jsonl.gz")
    rows = [json.loads(row) for row in gzip.decompress(standin.read_bytes()).decode().strip().split("\n")]
    write(tmp_path, rows + [{**row, "query": "Again: " + row["query"]} for row in rows])
    train = metamathqa.problems("train", str(tmp_path))
    validation = metamathqa.problems("validation", str(tmp_path))
    asked = [{p.prompt.replace("Again: ", "") for p in side} for side in (train, validation)]
    assert not asked[0] & asked[1] and len(train) + len(validation) == 2 * len(rows)
    held = gsm8k.problems("validation", str(shared("data/gsm8k")))
    assert asked[1] == {p.prompt for p in held}, "GSM8K and MetaMathQA hold out the same questions"
