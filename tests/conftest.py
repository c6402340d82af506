"""Fixtures that several test files share."""

import gc
import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jaxtyping
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a core each: PyTorch would take all of them in each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _or_skipped(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test of real weights that are not installed is skipped, in the words of the error."""
    from tl_dla.errors import ModelNotFoundError  # not before the shapes are checked

    try:
        return (yield)
    except ModelNotFoundError as error:
        if item.get_closest_marker("real"):
            pytest.skip(str(error))
        raise


pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_or_skipped)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(_or_skipped)


@pytest.fixture(autouse=True)
def freed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Real models are given back: they hold themselves, and the collector counts no bytes."""
    yield
    if request.node.get_closest_marker("real"):
        gc.collect()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Calls as users make them: without the shapes and types that tests check at run time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def folder() -> str:
    """A tiny LayerNorm model with biases everywhere, as a folder."""
    from tests.zoo.build import build

    return str(build("gpt2")[1])


@pytest.fixture
def run(folder: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command on that model; gives stdout."""
    from tl_dla.cli import main

    def command(*argv: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main([*argv, "--model", folder]) == code
        return capsys.readouterr().out

    return command
