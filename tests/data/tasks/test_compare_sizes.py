"""The generated task: deterministic, balanced, and its validation split truly held out."""

import subprocess
import sys
from collections import Counter

import pytest

from stablelora_jax import InputError, base_directory
from stablelora_jax.data.tasks.compare_sizes import KNOWN, NEW, questions
from stablelora_jax.data.tasks.small_world import SIZE
from stablelora_jax.models.pretrained.tokenizer import load_tokenizer


def test_splits_are_disjoint_and_balanced():
    train, validation = questions("train"), questions("validation")
    assert len(train) == 4000 and len(validation) == 400
    same = lambda q: (q.prompt.split(":")[0], frozenset(q.choices))
    assert not {same(q) for q in train} & {same(q) for q in validation}
    assert len({q.prompt for q in train}) == 4000 and len({q.id for q in train + validation}) == 4400
    assert Counter(q.label for q in validation) == dict.fromkeys(range(4), 100)
    assert Counter(q.label for q in train) == dict.fromkeys(range(4), 1000)


def test_labels_are_true_and_new_animals_are_new():
    assert not set(NEW) & set(KNOWN)
    for split in ("train", "validation"):
        for question in questions(split):
            names = [choice.strip() for choice in question.choices]
            sizes = [SIZE[name] for name in names]
            extreme = max(sizes) if "biggest" in question.prompt else min(sizes)
            assert sizes[question.label] == extreme and sizes.count(extreme) == 1 and len(set(names)) == 4
            assert all(name in question.prompt for name in names)
            assert set(names) <= set(NEW if "-new-" in question.id else KNOWN)
    assert not any("-new-" in question.id for question in questions("train"))


def test_the_same_in_another_process():
    code = "from stablelora_jax.data.tasks.compare_sizes import questions\n"
    code += "print([q for q in questions('validation')][::40])"
    env = {"PYTHONHASHSEED": "7", "PATH": ""}
    run = lambda: (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    )
    assert run().strip() == str(questions("validation")[::40])


def test_prompt_and_choice_tokenise_apart_as_together():
    tokenizer = load_tokenizer(base_directory())
    for question in questions("validation", count=64):
        prompt = tokenizer(question.prompt).input_ids
        counts = set()
        for choice in question.choices:
            alone = tokenizer(choice, add_special_tokens=False).input_ids
            assert tokenizer(question.prompt + choice).input_ids == prompt + alone
            counts.add(len(alone))
        assert counts == {1}


def test_seeds_differ_and_bad_input_is_named():
    assert questions("train", seed=1, count=16) != questions("train", count=16)
    with pytest.raises(InputError, match="no split 'test'"):
        questions("test")
    with pytest.raises(InputError, match="count must be between"):
        questions("train", count=0)
