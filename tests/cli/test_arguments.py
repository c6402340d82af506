"""The help needs no PyTorch, and what it says can be run."""

import shlex
import subprocess
import sys
from typing import get_args

import pytest

from tl_dla.cli import main
from tl_dla.cli.arguments import parser
from tl_dla.inputs.selection import Unit

SUBCOMMANDS = ("attribute", "lens", "scores", "report", "check", "dataset", "summarize")


@pytest.mark.parametrize("name", ["", *SUBCOMMANDS])
def test_help_needs_no_pytorch(name):
    code = f"import sys\nfrom tl_dla.cli import main\ntry: main({[*name.split(), '--help']})\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules, 'torch'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"usage: tl-dla {name}" in done.stdout


def test_the_examples_in_the_help_are_commands(capsys):
    for name in ("", *SUBCOMMANDS):
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        example = capsys.readouterr().out.split("example:\n")[1].strip()
        assert parser().parse_args(shlex.split(example)[1:]).subcommand == (name or "attribute")


def test_the_help_names_every_unit_that_needs_no_more_than_a_prompt(capsys):
    units = [unit for unit in get_args(Unit) if unit != "latent"]  # which needs a dictionary
    for name in ("attribute", "report", "dataset"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert (
            f"what the rows are: {', '.join(units)}".replace("component", "component (default)")
            in text
        )


def test_the_help_says_what_the_words_of_the_table_mean(capsys):
    with pytest.raises(SystemExit):
        main(["attribute", "--help"])
    words = capsys.readouterr().out.split("in the table:\n")[1]
    assert all(
        f"\n  {word}  " in f"\n{words}" for word in ("all rows", "rounding allows", "3_rest")
    )


def test_a_shell_completes_subcommands_flags_and_choices(tmp_path, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--print-completion", "bash"])
    script = tmp_path / "complete.bash"
    script.write_text(capsys.readouterr().out)
    cases = (
        ("tl-dla summ", "summarize"),
        ("tl-dla attribute --cand", "--candidates"),
        ("tl-dla check --dtype bf", "bfloat16"),
    )
    for line, expected in cases:
        words = f"COMP_WORDS=({line}); COMP_CWORD={line.count(' ')}"
        call = f'source {script}; {words}; _shtab_tl_dla; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", call], capture_output=True, text=True, check=True)
        assert done.stdout == f"{expected}\n"
