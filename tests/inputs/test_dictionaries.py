"""Dictionaries that cannot be what was meant are refused, each in one sentence."""

from types import SimpleNamespace

import pytest

from tests.support.dictionaries import RandomDictionary
from tests.support.models import load
from tests.zoo.build import ANSWERS, INCORRECT, tokens
from tl_dla import direct_logit_attribution
from tl_dla.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("unchecked")
POST, MLP = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def model():
    return load("gpt2")


@pytest.fixture(scope="module")
def sae(model):
    return RandomDictionary(model.cfg.d_model)


def refused(model, match, dictionaries, unit="latent", **options):
    with pytest.raises(ArgumentError, match=match):
        direct_logit_attribution(
            model, tokens(), ANSWERS, INCORRECT, unit=unit, dictionaries=dictionaries, **options
        )


def test_there_must_be_one_and_the_unit_must_want_it(model, sae):
    refused(model, r"needs dictionaries=\{hook: dictionary\}.*None was given", None)
    refused(model, "needs dictionaries", {})
    refused(model, 'dictionaries is for unit="latent"', {POST: sae}, unit="head")
    refused(model, "top_latents must be at least 1; 0", {POST: sae}, top_latents=0)


def test_the_hook_must_be_there_and_hold_what_can_be_explained(model, sae):
    wrong = {"blocks.1.hook_resid_pots": sae}
    refused(model, "no hook 'blocks.1.hook_resid_pots'.*did you mean blocks.1.hook_res", wrong)
    refused(model, "attn.hook_pattern of .* is none of them", {"blocks.1.attn.hook_pattern": sae})
    refused(model, "must have encode and decode; a object was given", {POST: object()})


def test_a_place_is_explained_once(model, sae):
    early = {POST: sae, "blocks.0.hook_mlp_out": sae}
    refused(model, "before a dictionary of the whole stream", early)
    refused(model, "explains as well: leave one out", dict(reversed(early.items())))
    heads = {"blocks.1.attn.hook_z": RandomDictionary(32), "blocks.1.hook_attn_out": sae}
    refused(model, "Two dictionaries explain 1_attn_out", heads)


def test_widths_are_held_to_the_place(model, sae):
    refused(model, r"cannot read what is there, \[2, 1, 32\]", {MLP: RandomDictionary(9)})
    refused(model, r"gives \[2, 1, 9\], where \[2, 1, 32\]", {MLP: RandomDictionary(32, 5, 9)})


def test_a_transcoder_is_given_under_both_hooks(model):
    transcoder = RandomDictionary(model.cfg.d_model)
    transcoder.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name_out=MLP))
    refused(
        model,
        r"says that it explains blocks.1.hook_mlp_out",
        {"blocks.1.hook_resid_mid": transcoder},
    )
