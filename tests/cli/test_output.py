"""What is written: the form that a file's name says, whole or not at all."""

import io
import json
import os
import stat

import pandas as pd
import pytest
import torch

from tl_dla import direct_logit_attribution
from tl_dla.cli import main, output
from tl_dla.loading import load_model

PROMPT = "w5 w60 w7 w42 w8"
GIVEN = ["attribute", PROMPT, "--answer", "w8"]


def test_parquet_is_the_librarys_table(run, folder, tmp_path):
    out = tmp_path / "a.parquet"
    assert run(*GIVEN, "--out", str(out)) == ""
    expected = direct_logit_attribution(load_model(folder), PROMPT, "w8").to_dataframe()
    assert pd.read_parquet(out).equals(expected)


def test_every_subcommand_with_rows_writes_parquet(run, tmp_path):
    for name in (["lens", PROMPT], ["check", PROMPT], [*GIVEN, "--audit"]):
        run(*name, "--out", str(tmp_path / "a.parquet"))
        table, text = pd.read_parquet(tmp_path / "a.parquet"), run(*name, "--csv")
        assert list(table.columns) == list(pd.read_csv(io.StringIO(text)).columns)


def test_a_form_that_cannot_be_written_is_refused_before_the_model_is_read(
    tmp_path, capsys, monkeypatch
):
    assert main([*GIVEN, "--out", "a.xlsx", "--model", "none"]) == 2
    assert "'a.xlsx' is of no form that can be written: name it .json" in capsys.readouterr().err
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None)
    out = str(tmp_path / "a.parquet")
    assert main([*GIVEN, "--out", out, "--model", "none"]) == 2
    assert "needs pyarrow: pip install 'tl-dla[dataset]'" in capsys.readouterr().err


def test_a_full_disk_leaves_what_was_there(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a.json"
    out.write_text("before")

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(out), "write_bytes", full)
    assert main([*GIVEN, "--out", str(out), "--model", folder]) == 2
    assert f"No space left on device: {str(out)!r}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.json"]
    assert out.read_text() == "before"


def test_out_writes_through_links_and_into_what_is_no_file(run, tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    run(*GIVEN, "--out", str(tmp_path / "link.json"))
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["token"] == "w8"
    run(*GIVEN, "--out", os.devnull)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_terminal_that_says_no_width_has_a_usual_one(run, monkeypatch):
    """`COLUMNS=0` is what some shells export; no table was printed at all."""
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the stream for a terminal
    text = run(*GIVEN)
    assert "\x1b[" in text and "all rows" in text


@pytest.mark.parametrize("columns", ["20", "80"])
def test_nothing_is_cut_or_wrapped_without_a_terminal(run, folder, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    prompt = " ".join(["w5 w60 w7 w42"] * 15)
    text = run("attribute", prompt, "--answer", "w8", "--unit", "head")
    assert f"of {prompt!r}, unit=" in text
    lens = run("lens", PROMPT, "--top", "50")
    assert "…" not in lens + text
    assert all(line.count("%") == 50 for line in lens.splitlines()[5:])


def test_what_no_known_part_wrote_is_said_in_a_line(folder, tmp_path, capsys, monkeypatch):
    from tl_dla.cli import commands

    library = direct_logit_attribution

    def with_a_writer_of_its_own(model, *args, **options):
        def write(module, given, output):
            return output + 0.5 * torch.arange(output.shape[-1]).cos().to(output)

        model.blocks[1].register_forward_hook(
            lambda module, given, out: (
                (write(module, given, out[0]), *out[1:])
                if isinstance(out, tuple)
                else write(module, given, out)
            )
        )
        return library(model, *args, **options)

    monkeypatch.setattr(commands, "direct_logit_attribution", with_a_writer_of_its_own)
    assert main([*GIVEN, "--model", folder, "--json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert "1_rest" in record["labels"]
    value = record["attribution"][record["labels"].index("1_rest")]
    line = f"1_rest {value:+.4f}: what no known part of the model wrote, and more than rounding"
    assert err == f"tl-dla warning: {line}; `tl-dla check` shows more\n"
    assert main([*GIVEN, "--model", folder]) == 0
    out, err = capsys.readouterr()
    assert f"\n! {line}" in out
    assert err == ""
    page = str(tmp_path / "page.html")
    assert main(["report", *GIVEN[1:], "--model", folder, "--out", page]) == 0
    assert f"tl-dla warning: {line}" in capsys.readouterr().err
