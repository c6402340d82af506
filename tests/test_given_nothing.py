"""Every public function says in a sentence what it needs, where None is given in its place."""

import pytest
import torch

import tl_dla
from tl_dla.errors import ArgumentError

PROMPT = "w5 w6"
# The arguments after the first, which is None.
MODEL = {
    "attribute_answer": (PROMPT, "w7"),
    "attribute_attention": (PROMPT, "L1H0"),
    "attribute_completion": (PROMPT, "w7"),
    "attribute_dataset": ([{"prompt": PROMPT, "answer": "w7"}],),
    "attribute_inputs": (PROMPT, "w7"),
    "check_model": (PROMPT,),
    "direct_logit_attribution": (PROMPT, "w7"),
    "load_model": (),
    "logit_lens": (PROMPT,),
    "required_hooks": (),
    "token_map": (0, 0),
    "unembedding_pca": (["w5", "w6", "w7"],),
}
RESULT = {
    "ablate": (["embed"],),
    "attribute_path": ("L1H0", 0),
    "compare": (None,),
    "copy_suppression": (),
    "direct_effect_recomputed": (),
    "erasures": (),
    "self_repair": ("embed",),
    "top_heads_with_patterns": (),
}
CACHE = {
    "accumulated_resid": (),
    "apply_ln_to_stack": (torch.zeros(3, 1, 32),),
    "decompose": (),
    "decompose_resid": (),
    "logit_attrs": (torch.zeros(3, 1, 32), 5),
    "stack_head_results": (),
}
NAMED = {"attribute_attention": {"key": 1}}
NOT_ASKED = {"load_result", "summarize"}  # they read a file or a folder


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", MODEL | RESULT | CACHE)
def test_none_is_answered_in_a_sentence(name):
    words = {**dict.fromkeys(MODEL, "[Mm]odel"), **dict.fromkeys(RESULT, "result must be")}
    words |= dict.fromkeys(CACHE, "cache must be an ActivationCache")
    with pytest.raises(ArgumentError, match=rf"{words[name]}.*None.* (was|were) given"):
        getattr(tl_dla, name)(None, *(MODEL | RESULT | CACHE)[name], **NAMED.get(name, {}))


def test_no_function_is_forgotten():
    functions = {name for name in tl_dla.__all__ if name[0].islower()}
    assert functions == {*MODEL, *RESULT, *CACHE, *NOT_ASKED}
