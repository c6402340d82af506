"""A model that two processes share out gives, in each of them, what it gives in one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tl_dla
from tests.support.models import of_4
from tests.support.sharded_worker import ANSWERS, INCORRECT, QUESTION, TOKENS, questions
from tests.zoo.build import build

ROOT = Path(__file__).parents[2]
pytestmark = of_4

# Norms after each sublayer and biases everywhere; experts; W_QKV in one, which has to be split.
# All have 97 tokens, which two processes cannot halve.
SHARED = ["gemma3_bias-tp", "gemma3_bias-fsdp", "mixtral-tp", "phi3-tp", "gpt2-fsdp"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes answered, by the model's name and the way it is shared out."""
    root = tmp_path_factory.mktemp("shared")
    folders = [root / name for name in SHARED]
    for folder in folders:
        shutil.copytree(build(folder.name.partition("-")[0])[1], folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "tests.support.sharded_worker"]
    done = subprocess.run(
        [*command, *map(str, folders)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {x.name: [torch.load(x / f"{rank}.pt") for rank in range(2)] for x in folders}


def whole(name: str):
    return tl_dla.load_model(AutoModelForCausalLM.from_pretrained(build(name)[1]).eval())


@pytest.mark.parametrize("name", SHARED[:3])
def test_every_process_gives_what_one_process_gives(found, name):
    expected = questions(whole(name.partition("-")[0]))
    for answers in found[name]:
        for question, values in expected.items():
            assert values.isfinite().any()
            size = float(values[values.isfinite()].abs().max())
            torch.testing.assert_close(
                answers[question], values, atol=2e-5 * size, rtol=1e-4, equal_nan=True, msg=question
            )


def test_the_rows_add_up_to_the_logits_of_the_plain_model(found):
    model, _ = build("gemma3_bias")
    logits = model(TOKENS).logits[:, -1]
    difference = (logits.gather(1, ANSWERS[:, None]) - logits.gather(1, INCORRECT[:, None]))[:, 0]
    for answers in found["gemma3_bias-tp"]:
        for unit in ("component", "head", "source", "neuron"):
            torch.testing.assert_close(answers[unit].sum(0), difference, atol=1e-4, rtol=1e-4)


def test_what_numbers_the_heads_of_the_whole_model_is_refused_by_name(found):
    for answers in found["gemma3_bias-tp"]:
        refused = answers["refused"]
        assert "cannot be overwritten" in refused["ablate"]
        assert "blocks.0.attn.o.hook_in" in refused["ablate"]
        assert "0_attn_out, 0_mlp_out" in refused["ablate"]
        assert 'lines="frozen" works' in refused["gradient"]
        assert "must all run each batch" in refused["dataset"]
        assert "give all of them the same" in refused["other prompts"]
    for name in ("phi3-tp", "gpt2-fsdp"):
        for answers in found[name]:
            assert "splits joint weights of this" in answers["load"]


def test_under_fsdp_each_process_runs_prompts_of_its_own(found):
    model = whole("gemma3_bias")
    for rank, answers in enumerate(found["gemma3_bias-fsdp"]):
        own = (TOKENS.roll(rank, 1), ANSWERS + rank, QUESTION[2])
        expected = tl_dla.direct_logit_attribution(model, *own, unit="neuron").attribution
        torch.testing.assert_close(answers["own prompts"], expected, atol=1e-5, rtol=1e-4)
