"""The bundled demo model: its files, its tokenizer, and what it claims to have learned."""

import random

import pytest
from transformers import AutoTokenizer

from tl_dla import demo
from tl_dla.datasets.ioi import classic_prompts, ioi_prompts
from tl_dla.demo import corpus, load_bridge, train
from tl_dla.demo.evaluate import Evaluation, evaluate
from tl_dla.loading import load_model

SHIPPED = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.FOLDER)


@pytest.fixture(scope="module")
def evaluation(model) -> Evaluation:
    return evaluate(model)


def complete(model, text: str) -> str:
    return model.tokenizer.decode(model(model.to_tokens(text))[0, -1].argmax())


def test_the_files_take_less_than_4_megabytes():
    assert sum((demo.FOLDER / name).stat().st_size for name in SHIPPED) < 4_000_000


def test_every_word_of_the_corpus_is_one_token(tokenizer):
    assert [w for w in corpus.vocabulary() if len(tokenizer.tokenize(w)) != 1] == []
    assert tokenizer.tokenize("Mary and Mary") == ["Mary", "Ġand", "ĠMary"]


@pytest.mark.parametrize("text", ["When John and Mary left,", "Zoë paid 3 €\n\t twice  "])
def test_decoding_undoes_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_tokenizer_that_is_shipped_is_the_one_that_the_script_builds(tokenizer):
    assert tokenizer.get_vocab() == train.build_tokenizer().get_vocab()


def test_prompts_start_with_the_token_that_texts_started_with_in_training(model):
    assert model.to_str_tokens("When Mary") == ["<|endoftext|>", "When", " Mary"]


def test_nothing_held_out_is_trained_on():
    held_out = {fact.text for fact in corpus.facts() if fact.held_out}
    drawn = [next(prompts) for prompts in [corpus.training_prompts(random.Random(0))] * 5_000]
    assert not any(prompt.held_out or prompt.text in held_out for prompt in drawn)


def test_a_seed_fixes_the_corpus():
    first, second = (corpus.training_prompts(random.Random(3)) for _ in range(2))
    assert [next(first) for _ in range(50)] == [next(second) for _ in range(50)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("When John and Mary went to the shops, John gave the bag to", " Mary"),
        ("When Mary and John went to the store, John gave a drink to", " Mary"),
        ("When Tom and James went to the park, James gave the ball to", " Tom"),
        ("The Eiffel Tower is in the city of", " Paris"),
        ("Big Ben is in the city of", " London"),
        ("The capital of France is", " Paris"),
        ("The language of France is", " French"),
    ],
)
def test_the_model_completes(model, text, answer):
    assert complete(model, text) == answer


def test_the_model_solves_the_usual_eight_prompts_and_the_packages_own(model):
    prompts = [*ioi_prompts(model, 100), *classic_prompts(model)]
    solved = [complete(model, prompt["prompt"]) == prompt["answer"] for prompt in prompts]
    assert sum(solved) >= 0.95 * len(solved)


def test_held_out_indirect_objects_and_facts_are_completed(evaluation):
    assert evaluation.indirect_objects.accuracy > 0.95
    assert evaluation.facts.accuracy > 0.95


def test_repetitions_are_completed_by_a_head_that_looks_up_the_first_time(evaluation):
    assert evaluation.induction_accuracy > 5 * evaluation.induction_chance
    assert evaluation.induction_attention.max() > 0.5


def test_heads_write_indirect_objects_and_mlps_write_facts(evaluation):
    people, facts = evaluation.indirect_objects, evaluation.facts
    assert people.heads.sum() > 4 * people.mlps.sum().abs()
    assert facts.mlps.sum() > 4 * facts.heads.sum().abs()


def test_the_head_that_writes_most_of_the_indirect_object_attends_to_it(evaluation):
    heads = evaluation.indirect_objects.heads
    assert divmod(int(heads.argmax()), heads.shape[1]) in train.NAME_MOVERS
    for layer, head in train.NAME_MOVERS:
        assert heads[layer, head] > 1
        assert evaluation.attention_to_answer[layer, head] > 0.9


def test_the_final_bias_prefers_frequent_names(evaluation):
    assert evaluation.name_prior > 0.5


@pytest.mark.slow
def test_the_script_trains_a_model_that_has_learned(tmp_path):
    """A fifth of the steps: well above chance, which is 1 in 51 names and about as many places."""
    train.main(["--steps", "700", "--out", str(tmp_path)])
    evaluation = evaluate(load_bridge(tmp_path))
    assert evaluation.indirect_objects.accuracy > 0.2
    assert evaluation.facts.accuracy > 0.2
