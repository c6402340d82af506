"""The table "TransformerLens → tl_dla" and the glossary: names exist, and the code runs."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from transformer_lens import ActivationCache

import tl_dla
from tests.support.models import of_4
from tl_dla.analyses.lens_result import LogitLens
from tl_dla.attribution import DirectLogitAttribution

DOCS = Path(__file__).parents[1] / "docs"
TABLE = (DOCS / "from_transformer_lens.md").read_text(encoding="utf-8")
GLOSSARY = (DOCS / "glossary.md").read_text(encoding="utf-8")


def calls(text):
    """The names that are called, or read off a result, in code between backticks."""
    code = re.findall(r"`([^`\n]+)`", text)
    return {name for one in code for name in re.findall(r"(?<![\w.])([a-z]\w+)\(", one)}


def test_every_function_of_the_table_is_public():
    ours = set()
    for line in TABLE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) >= 2 and "---" not in line:
            ours |= calls(cells[1])
    missing = {name for name in ours if not hasattr(tl_dla, name)}
    assert len(ours) > 12 and not missing - {"save", "open", "plot", "plot_trajectory"}


@of_4
def test_every_method_of_a_cache_in_the_table_is_one():
    theirs = set(re.findall(r"`cache\.(\w+)\(", TABLE))
    assert len(theirs) >= 8 and all(hasattr(ActivationCache, name) for name in theirs)


def test_what_is_read_off_a_result_is_there():
    names = set(re.findall(r"`result\.(\w+)", TABLE + GLOSSARY))
    assert len(names) >= 6
    held = set(dir(DirectLogitAttribution)) | {f.name for f in fields(DirectLogitAttribution)}
    assert not names - held
    assert all(hasattr(LogitLens, name) for name in ("plot", "plot_trajectory"))


def test_the_code_of_the_table_runs(capsys):
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", TABLE, re.S):
        exec(block, scope)  # noqa: S102
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(scope["result"].labels) + 1 and "[10, 1]" in lines[-1]


@pytest.mark.parametrize("unit", ["component", "layer", "head", "neuron", "source", "latent"])
def test_the_glossary_knows_every_unit_and_is_in_order(unit):
    assert f"`{unit}`" in GLOSSARY
    words = [word.lower().strip(".") for word in re.findall(r"^\*\*(.+?)\*\*", GLOSSARY, re.M)]
    assert words == sorted(words) and len(words) > 25
