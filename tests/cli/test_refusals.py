"""What the command cannot do is one line on stderr, with an exit code that says why."""

import json
import sys
import warnings

import pytest
import torch

from tests.zoo.build import build
from tl_dla import direct_logit_attribution
from tl_dla.cli import commands, main
from tl_dla.loading import load_model

PROMPT = "w5 w60 w7 w42 w8"
TWICE = ["--incorrect", "w9", "--incorrect"]
IDS = torch.tensor([[1, 5, 60, 7, 42, 8]])  # w1 is the tokenizer's BOS, which models prepend


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["attribute", PROMPT, "--unit", "heads"], "unit must be one of component"),
        (["attribute", PROMPT, "--answer", "w8 w9"], "'w8 w9' is 2 tokens"),
        (["attribute", ""], "The prompt is empty"),
        (["attribute", PROMPT, "--pos", "6"], "Position 6 is outside prompt 0, which has 6 tokens"),
        (["attribute", PROMPT, "--out", "/no/such/a.csv"], "there is no folder /no/such"),
        (["attribute", PROMPT, "--out", "/"], "cannot be written to /: it is a folder"),
        (["attribute", PROMPT, *TWICE, "mean"], "is the mean of the whole vocabulary and stands"),
        (["attribute", PROMPT, *TWICE, "runner-up"], "of each, is for --completion"),
        (["lens", PROMPT, "--answer", "w8", *TWICE, "mean"], "by --incorrect-id"),
        (["report", PROMPT, "--out", "a.txt"], "'a.txt' is of another form: a report is a page"),
        (["attribute", PROMPT, "--device", "cuda:99"], "--device 'cuda:99' cannot be used"),
        (["attribute", PROMPT, "--max-new-tokens", "3"], "is for --completion without TEXT"),
        (["attribute", PROMPT, "--device", "gpu"], "--device 'gpu' cannot be used"),
        (["attribute", PROMPT, "--top", "0"], "'0' is not a whole number of 1 or more"),
        (["attribute", PROMPT, "--json", "--csv"], "not allowed with argument"),
        (["attribute", PROMPT, "--answer-id", "97"], "Token id 97 is outside the vocabulary"),
        (["attribute", PROMPT, "--answer", "w8", "--answer-id", "8"], "not allowed with argument"),
        (["attribute", PROMPT, "--dtype", "float8"], "invalid choice: 'float8'"),
        (["attribute", PROMPT, "--heads"], "unrecognized arguments: --heads"),
        (["attribute"], "required: PROMPT (see tl-dla attribute --help)"),
        (["attribue", PROMPT], "invalid choice: 'attribue'"),
        ([], "required: <subcommand>"),
        (["lens", PROMPT, "--incorrect", "w9"], "answer_tokens is required"),
        (["lens", PROMPT, "--top", "98"], "top_k must be 1 to 97"),
        (["lens", PROMPT, "--out", "/no/such/a.csv"], "there is no folder /no/such"),
        (["report", PROMPT], "required: --out"),
        (["report", PROMPT, "--out", "/no/such/a.html"], "there is no folder /no/such"),
        (["report", "", "--out", "page.html"], "The prompt is empty"),
        (["check", ""], "The prompt is empty"),
        (["dataset", "missing.jsonl"], "There is no file 'missing.jsonl'"),
        (["summarize", "missing"], "missing"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(folder, capsys, argv, fragment):
    model = (
        ["--model", folder] if argv and argv[0] in ("attribute", "lens", "report", "check") else []
    )
    assert_one_line([*argv, *model], fragment, capsys)


@pytest.mark.parametrize(
    ("stream", "argv", "words"),
    [
        ("stdout", ["attribute", PROMPT], "stdout is closed: name a file with --out"),
        ("stdin", ["attribute", "-"], "The prompt - is read from stdin, which is closed"),
    ],
)
def test_a_closed_stream_is_one_line(capsys, monkeypatch, stream, argv, words):
    """Python has None for what was closed; the model is not read."""
    monkeypatch.setattr(sys, stream, None)
    assert main([*argv, "--model", "none"]) == 2
    assert words in capsys.readouterr().err


def test_a_closed_stderr_is_told_nothing(folder, tmp_path, monkeypatch):
    out = tmp_path / "a.json"
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["attribute", PROMPT, "--model", folder, "--out", str(out)]) == 0
    sys.stderr.close()
    assert json.loads(out.read_text())["token"]


def assert_one_line(argv, fragment, capsys, code=2):
    capsys.readouterr()
    try:
        assert main(argv) == code
    except SystemExit as stop:  # argparse
        assert stop.code == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "no --answer" not in line]
    assert out == ""
    assert len(lines) == 1
    assert lines[0].startswith("tl-dla")
    assert fragment in lines[0]


def test_a_model_that_does_not_load_is_one_line(tmp_path, capsys):
    assert_one_line(
        ["attribute", PROMPT, "--model", str(tmp_path / "none")], "no file or folder", capsys
    )
    assert_one_line(["attribute", PROMPT, "--model", str(tmp_path)], "config.json", capsys)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    assert_one_line(
        ["attribute", PROMPT, "--model", str(tmp_path)], "could not be loaded: ", capsys
    )


def test_what_should_not_happen_is_one_line_and_exit_code_3(folder, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of\n  memory")

    monkeypatch.setattr(commands, "direct_logit_attribution", broken)
    argv = ["attribute", PROMPT, "--answer", "w8", "--model", folder]
    assert_one_line(argv, "RuntimeError: out of memory (--traceback", capsys, code=3)
    assert main([*argv, "--traceback"]) == 3
    assert "in broken" in capsys.readouterr().err


def test_an_interrupt_leaves_no_traceback(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "direct_logit_attribution", interrupted)
    argv = ["attribute", PROMPT, "--answer", "w8", "--model", folder]
    assert_one_line(argv, "interrupted", capsys, code=130)


def test_warnings_of_this_package_are_one_line_and_others_are_left_out(run, capsys, monkeypatch):
    library = direct_logit_attribution

    def warning(*args, **kwargs):
        warnings.warn("of a library", stacklevel=1)
        warnings.warn_explicit(
            "of\nthis package", UserWarning, "tokens.py", 1, "tl_dla.inputs.tokens"
        )
        return library(*args, **kwargs)

    monkeypatch.setattr(commands, "direct_logit_attribution", warning)
    argv = ["attribute", PROMPT, "--answer", "w8", "--model", str(build("gpt2")[1])]
    assert main(argv) == 0
    assert capsys.readouterr().err == "tl-dla warning: of this package\n"


def test_what_libraries_print_does_not_reach_stdout(run, monkeypatch):
    library = load_model

    def talkative(*args, **kwargs):
        sys.stdout.write("Loaded pretrained model")
        return library(*args, **kwargs)

    monkeypatch.setattr(commands, "load_model", talkative)
    json.loads(run("attribute", PROMPT, "--answer", "w8", "--json"))
