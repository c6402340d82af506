"""A folder belongs to one model: its weights, its buffers, its numbers and the hooks on it."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch

from tests.support.models import load, of_4
from tests.support.runs import make, run
from tests.zoo.build import boot, build, tokens
from tl_dla import attribute_dataset, summarize
from tl_dla.datasets.manifest import hooks_digest, model_digest
from tl_dla.errors import OutputFolderError
from tl_dla.loading import load_model


def test_the_digest_is_of_the_weights_not_of_where_they_are(tmp_path):
    _, folder = build("gpt2")
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    here, there = load_model(folder, device="cpu"), load_model(moved, device="cpu")
    assert model_digest(here) == model_digest(there)
    weights = there.original_model.transformer.wte.weight.detach().view(-1)
    a, b = weights[:2].tolist()
    weights[0], weights[1] = b, a
    assert a != b
    assert model_digest(here) != model_digest(there)


@of_4
def test_a_model_without_a_configuration_of_its_own_has_a_digest(tmp_path):
    examples = [{"prompt": row.tolist(), "answer": 5} for row in tokens()]
    model = load("native_ln")
    found = attribute_dataset(model, examples, out=tmp_path, progress=False)
    assert summarize(tmp_path).labels == found.labels
    other = boot("native_ln")
    assert model_digest(other) == model_digest(model)
    with torch.no_grad():
        next(other.parameters()).mul_(2.0)
    assert model_digest(other) != model_digest(model)


def edit_frequencies(model):
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    rotary.inv_freq[1] *= 1.5


def edit_epsilon(model):
    norm = next(m for m in model.original_model.modules() if hasattr(m, "variance_epsilon"))
    norm.variance_epsilon *= 100


def scale(hidden, hook, *, by):
    return hidden * by


def add_hook(model, by=3.0):
    model.add_hook("blocks.0.hook_resid_post", partial(scale, by=by))


@pytest.mark.parametrize("edit", [edit_frequencies, edit_epsilon, add_hook])
def test_a_run_is_not_continued_with_another_model(edit, tmp_path):
    """Of the same weights: the means of such a mixture were off by 0.036."""
    examples, out = make(40), tmp_path / "run"
    run(boot("llama"), examples[:32], out)
    other = boot("llama")
    edit(other)
    alone = run(other, examples, tmp_path / "alone")
    assert float(alone.logit.mean) != float(run(boot("llama"), examples).logit.mean)
    with pytest.raises(OutputFolderError, match="its model's (digest|hooks) is"):
        run(other, examples, out)
    same = boot("llama")
    edit(same)
    assert torch.equal(run(same, examples, tmp_path / "alone").mean, alone.mean)


def test_hooks_are_told_apart_by_their_code_and_by_what_they_hold():
    model, vector = boot("gpt2"), torch.ones(32)

    def digest(hook):
        model.add_hook("blocks.1.hook_resid_pre", hook)
        found = hooks_digest(model)
        model.reset_hooks()
        return found

    def steering(vector):
        return lambda hidden, hook: hidden + vector

    class Steering:
        def __init__(self, vector):
            self.vector = vector

        def add(self, hidden, hook):
            return hidden + self.vector

    hooks = [
        lambda: partial(scale, by=2.0),
        lambda: partial(scale, by=2.5),
        lambda: steering(vector),
        lambda: steering(2 * vector),
        lambda: Steering(vector).add,
        lambda: Steering(-vector).add,
        lambda: lambda hidden, hook: hidden * 2,
        lambda: lambda hidden, hook: hidden * 3,
    ]
    digests = [digest(make()) for make in hooks]
    assert len(set(digests)) == len(hooks)
    assert [digest(make()) for make in hooks] == digests
    assert hooks_digest(model) is None


def test_using_a_model_does_not_change_its_digest():
    for name in ("gpt2", "llama"):
        model = boot(name)
        before = model_digest(model), hooks_digest(model)
        model.run_with_cache(torch.arange(3, 40)[None])
        run(model, make(4), unit="component")
        assert (model_digest(model), hooks_digest(model)) == before
