"""The arguments of `tl-dla`: one table of flags, and one of subcommands that take them."""

import argparse
import sys
from importlib import metadata
from typing import Any, NamedTuple, NoReturn

from tl_dla.cli.messages import one_line


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _flag(help: str | None = None, metavar: str | None = None, **settings: Any) -> dict[str, Any]:
    return {"help": help, "metavar": metavar, **settings}


def _switch(help: str) -> dict[str, Any]:
    return {"help": help, "action": "store_true"}


def _place(text: str) -> int | str:
    """A position where it is a number; a token's text otherwise."""
    return int(text) if text.removeprefix("-").isdecimal() else text


GENERATED = object()  # --completion without a text
_OWN = "the model's own top prediction without it"
_UNITS = "component (default), layer, head, neuron, source"
_MODELS = "demo (default), smollm2, gemma3, a folder, a .gguf file or a hub id"
_DTYPES = ["float32", "float64", "bfloat16", "float16"]
_MEAN = "several are averaged; 'mean' is the whole vocabulary's mean"
_FORMS = ".json, .csv and .parquet choose the form, .txt is the table"

_FLAGS: dict[str, dict[str, Any]] = {
    "prompt": _flag("the text; - reads it from stdin", "PROMPT"),
    "--pos": _flag(
        "position of the prompt, 0 for the first token (default -1, the last)",
        "P",
        type=int,
        default=-1,
    ),
    "--corrupted": _flag("another prompt, of any length, to set against it", "PROMPT"),
    "--against": _flag("another model of the same architecture, to set against --model", "NAME"),
    "--answer": _flag(f"the token whose logit it is; {_OWN}", "TOKEN"),
    "--answer-id": _flag("the same, by id", "ID", dest="answer", type=int),
    "--candidates": _flag(
        "in place of --answer: a column for each of these", "TOKEN", nargs="+", default=None
    ),
    "--completion": _flag(
        "in place of --answer: what follows the prompt, of any number of tokens; without TEXT what"
        " the model says. Their logits are added up, and --incorrect is another text, mean, or"
        " runner-up (the likeliest other token of each)",
        "TEXT",
        nargs="?",
        const=GENERATED,
    ),
    "--max-new-tokens": _flag(
        "how many tokens the model says at most, for --completion without TEXT (default 32)",
        "N",
        type=_count,
    ),
    "--incorrect": _flag(f"a token to compare with; {_MEAN}", "TOKEN", action="append"),
    "--incorrect-id": _flag("the same, by id", "ID", dest="incorrect", action="append", type=int),
    "--model": _flag(_MODELS, "NAME", default="demo"),
    "--dtype": _flag(default="float32", choices=_DTYPES),
    "--device": _flag("cpu, cuda, cuda:1, mps (default: an accelerator if any)"),
    "--unit": _flag(f"what the rows are: {_UNITS}", default="component"),
    "--layer": _flag(
        "a layer to split, for neuron and source (default all)",
        "L",
        dest="layers",
        action="append",
        type=int,
    ),
    "--head": _flag(
        "a head to split, for source (default all)", "L9H9", dest="heads", action="append"
    ),
    "--query": _flag(
        "the token that looks: its position (default -1, the last), or its text where it is once in"
        " the prompt",
        "TOKEN",
        type=_place,
        default=-1,
    ),
    "--key": _flag("the token that is looked at, in the same forms", "TOKEN", type=_place),
    "--versus": _flag(
        "the token that it is compared with; without it, the score itself", "TOKEN", type=_place
    ),
    "--mlp": _flag(
        "how a gated MLP is frozen: each factor takes half (default), or the gate is a constant",
        default="half",
        choices=["half", "gate"],
    ),
    "--audit": _switch(
        "also run the model without each of the largest rows, and show what changed"
    ),
    "--out": _flag(f"write there: {_FORMS}", "FILE"),
    "--json": _switch("everything, as JSON"),
    "--csv": _switch("all rows, as CSV"),
    "--top": _flag("rows shown (default 12)", "K", type=_count, default=12),
    "--split": _flag("of a hub dataset (default train)", default="train"),
    "--batch-size": _flag("default 16", "N", type=_count, default=16),
    "--on-error": _flag(
        "an example that cannot be attributed: leave it out and say so (default), or stop",
        default="skip",
        choices=["skip", "raise"],
    ),
    "-v/--verbose": _switch("every identity with its numbers, not only those that fail"),
    "--traceback": _switch("show where an error comes from"),
}
# One of each kind at most.
_EXCLUSIVE = {
    **dict.fromkeys(["--answer", "--answer-id", "--candidates", "--completion"], "answer"),
    **dict.fromkeys(["--json", "--csv"], "form"),
}


class _Subcommand(NamedTuple):
    """What it does, its flags (those that differ from the table: how), and an example."""

    what: str
    flags: str
    example: str
    own: dict[str, dict[str, Any]]
    words: str = ""


_IOI = "tl-dla {} 'When John and Mary went to the shops, John gave the bag to'"
_MODEL = "--model --dtype --device"
_WORDS = """\
in the table:
  #0               the rank of a token in the model's own prediction: 0 is the likeliest
  all rows         what the rows add up to; for --unit layer, whose rows are readings of the stream,
                   the last reading and the biases
  rounding allows  the largest error that rounding can make of rows that add up exactly
  3_rest           what block 3 did to the stream beyond its known parts (embed_rest: before block
                   0); such a row is there only where it is more than rounding

"""
_SUBCOMMANDS = {
    "attribute": _Subcommand(
        "Split a logit, or a logit difference, into what each part of the model wrote to it",
        "prompt --pos --answer --answer-id --candidates --completion --max-new-tokens --incorrect"
        f" --incorrect-id {_MODEL} --unit --layer --head --top --audit --out --json --csv",
        f"{_IOI.format('attribute')} --answer ' Mary' --incorrect ' John' --unit head --top 10",
        {
            "--top": {"default": None},
            "--out": {"help": f"write there: {_FORMS}, .html is the page of a --completion"},
        },
        _WORDS,
    ),
    "compare": _Subcommand(
        "What changed between two prompts, or two models, and whether parts or their readout did",
        "prompt --corrupted --against --pos --answer --answer-id --incorrect --incorrect-id"
        f" {_MODEL} --unit --layer --head --top --out --json --csv",
        f"{_IOI.format('compare')} --corrupted 'When John and Mary went to the shops, Mary gave the"
        " bag to' --answer ' Mary' --incorrect ' John' --unit head",
        {"--out": {"help": f"write there: {_FORMS}, .html is a page"}},
        "in the table:\n"
        "  wrote  what the part wrote differently, read out as the two runs do on average\n"
        "  read   the readout's own change (norm scale, unembedding), of what was written\n\n",
    ),
    "lens": _Subcommand(
        "What the model would predict from the residual stream after each sublayer (logit lens)",
        "prompt --pos --answer --answer-id --incorrect --incorrect-id"
        f" {_MODEL} --top --out --json --csv",
        "tl-dla lens 'The Eiffel Tower is in the city of' --answer ' Paris'",
        {
            "--answer": {"help": "a token to follow"},
            "--top": {"default": 3, "help": "predictions a point (default 3)"},
        },
    ),
    "scores": _Subcommand(
        "Why a head looks at one token rather than another: who wrote its query and its keys",
        f"prompt --head --query --key --versus {_MODEL} --unit --top --out --json --csv",
        f"{_IOI.format('scores')} --head L3H0 --key ' Mary' --versus 2",
        {
            "--head": {"help": "the head", "dest": "head", "action": "store", "required": True},
            "--key": {"required": True},
            "--unit": {
                "help": "how the writers are split: head (default), component",
                "default": "head",
            },
            "--top": {"default": 8, "help": "rows shown of either side (default 8)"},
        },
    ),
    "inputs": _Subcommand(
        "Which tokens of the prompt wrote a logit, through every layer",
        "prompt --pos --answer --answer-id --incorrect --incorrect-id --mlp"
        f" {_MODEL} --top --out --json --csv",
        f"{_IOI.format('inputs')} --answer ' Mary' --incorrect ' John'",
        {"--out": {"help": f"write there: {_FORMS}, .html is the page with the flow"}},
    ),
    "report": _Subcommand(
        "Write figures, lens, heads and certificate of an attribution to one self-contained page",
        "prompt --pos --answer --answer-id --candidates --incorrect --incorrect-id"
        f" {_MODEL} --unit --layer --head --top --audit --out",
        f"{_IOI.format('report')} --answer ' Mary' --incorrect ' John' --out page.html",
        {
            "--out": {"help": "the HTML page to write", "required": True},
            "--top": {"default": 3, "help": "heads of either sign (default 3)"},
        },
    ),
    "check": _Subcommand(
        "Where a model first departs from what attribution takes for granted (exit code 1)",
        f"prompt {_MODEL} -v/--verbose --out --json --csv",
        "tl-dla check 'The Eiffel Tower is in the city of' --model smollm2",
        {},
    ),
    "dataset": _Subcommand(
        "Attribute every prompt of a file, and give the statistics of each row",
        f"source --split --batch-size {_MODEL} --unit --top --on-error --out --json --csv",
        "tl-dla dataset prompts.jsonl --model smollm2 --unit head --batch-size 16 --out runs/ioi",
        {
            "source": _flag(
                ".jsonl or .csv with the fields prompt, answer, incorrect, group; or a hub"
                " dataset id",
                "PROMPTS",
            ),
            "--out": _flag(
                "keep every prompt's rows there; the same command continues a run that stopped",
                "FOLDER",
                dest="folder",
            ),
        },
    ),
    "summarize": _Subcommand(
        "The statistics of a folder that `tl-dla dataset` wrote, without the model",
        "folder --top --out --json --csv",
        "tl-dla summarize runs/ioi",
        {"folder": _flag("what --out of `tl-dla dataset` named", "FOLDER")},
    ),
}


class _Parser(argparse.ArgumentParser):
    """Errors as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


class _PrintCompletion(argparse.Action):
    """Prints the script by which a shell completes subcommands and flags."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        import shtab

        sys.stdout.write(shtab.complete(parser, given[1]) + "\n")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    layout: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }
    whole = _Parser(
        prog="tl-dla",
        description="Which parts of a language model wrote this logit, in rows that add up to it.",
        epilog=f"example:\n  {_IOI.format('attribute')} --answer ' Mary' --incorrect ' John'",
        **layout,
    )
    version = f"tl-dla {metadata.version('tl-dla')}"
    whole.add_argument("--version", action="version", version=version)
    whole.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=["bash", "zsh", "tcsh"],
        help="a script that completes this command: source <(tl-dla --print-completion bash)",
    )
    subcommands = whole.add_subparsers(dest="subcommand", required=True, metavar="<subcommand>")
    for name, sub in _SUBCOMMANDS.items():
        one = subcommands.add_parser(
            name,
            help=sub.what[0].lower() + sub.what[1:],
            description=f"{sub.what}.",
            epilog=f"{sub.words}example:\n  {sub.example}",
            **layout,
        )
        one.set_defaults(out=None)  # `dataset` keeps a folder, and answers on stdout
        groups: dict[str, Any] = {}
        for flag in [*sub.flags.split(), "--traceback"]:
            to: Any = one
            if flag in _EXCLUSIVE:
                to = groups.get(_EXCLUSIVE[flag]) or one.add_mutually_exclusive_group()
                groups[_EXCLUSIVE[flag]] = to
            settings = {**_FLAGS.get(flag, {}), **sub.own.get(flag, {})}
            to.add_argument(*flag.split("/"), **settings)
    return whole
