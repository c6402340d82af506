"""The public names are one list, which type checkers and users read."""

import ast
from importlib import import_module
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import tl_dla


def test_the_public_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(tl_dla.__file__).with_suffix(".pyi").read_text())
    seen = {
        (node.module, alias.asname)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(name for _, name in seen) == sorted(tl_dla.__all__)
    for module, name in seen:
        assert getattr(tl_dla, name) is getattr(import_module(f"tl_dla.{module}"), name)
    assert set(tl_dla.__all__) <= set(dir(tl_dla))
    with pytest.raises(AttributeError, match="nothing"):
        tl_dla.nothing  # noqa: B018


def test_shapes_are_checked_while_tests_run():
    readout = tl_dla.Readout(torch.ones(1, 3))
    with pytest.raises(TypeCheckError, match="of_bias"):
        readout.of_bias(torch.ones(2, 3))
