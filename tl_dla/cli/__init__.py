"""The command `tl-dla`: the package from a shell, one subcommand for each thing it does.

What was asked for goes to stdout (or to `--out`) and everything else to stderr, so that stdout can
be piped. What cannot be done is one line on stderr and exit code 2. PyTorch and TransformerLens are
imported when a subcommand runs (`commands.py`) and not here, so that `--help` is instant.
"""

import argparse
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import metadata
from typing import Any, NoReturn

from tl_dla.errors import TlDlaError

_IOI = "tl-dla {} 'When John and Mary went to the shops, John gave the bag to'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0; 1 for a model that fails its check; 2 for what cannot be done (a `TlDlaError`, a file that is
    not there, bad arguments), and 3 for what should not happen, with one line on stderr.

    Args:
        argv: the arguments after the command's name; those of the process by default.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    args.command = shlex.join(["tl-dla", *argv])
    try:
        from tl_dla.cli import commands

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what libraries tell programmers
            warnings.filterwarnings("always", category=UserWarning, module="tl_dla")
            warnings.showwarning = _show_warning
            with redirect_stdout(sys.stderr):  # what libraries print
                output = getattr(commands, args.subcommand)(args)
        return 0 if output is None else output.write(args)
    except BrokenPipeError:  # `tl-dla … | head`: what is still to be written has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TlDlaError, OSError, ImportError) as error:
        return _fail(error, 2, args)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, args)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error} (--traceback shows where)", 3, args)


def _fail(error: object, code: int, args: argparse.Namespace) -> int:
    if args.traceback:
        traceback.print_exc()
    tell(f"{args.subcommand}: {error}")
    return code


def tell(message: object) -> None:
    """One line on stderr."""
    sys.stderr.write(f"tl-dla {_one_line(message)}\n")


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    tell(f"warning: {message}")


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


# ---- the arguments -----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Errors as one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)} (see {self.prog} --help)\n")


def _parser() -> _Parser:
    parser = _Parser(
        prog="tl-dla",
        description="Which parts of a language model wrote this logit, in rows that add up to it.",
        epilog=f"example:\n  {_IOI.format('attribute')} --answer ' Mary' --incorrect ' John'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"tl-dla {metadata.version('tl-dla')}"
    parser.add_argument("--version", action="version", version=version)
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="<subcommand>")

    def add(name: str, what: str, example: str, *parents: _Parser) -> _Parser:
        return subcommands.add_parser(
            name,
            help=what[0].lower() + what[1:],
            description=f"{what}.",
            epilog=f"example:\n  {example}",
            parents=[*parents, _debugging()],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    attribute = add(
        "attribute",
        "Split a logit, or a logit difference, into what each part of the model wrote to it",
        f"{_IOI.format('attribute')} --answer ' Mary' --incorrect ' John' --unit head --top 10",
        _prompt(),
        _position(),
        _answers("the model's own top prediction without it"),
        _model(),
        _unit(),
        _choice(),
        _out(),
        _form(),
    )
    attribute.add_argument(
        "--top", type=_count, metavar="K", help="rows shown in the table (default 12)"
    )
    lens = add(
        "lens",
        "What the model would predict from the residual stream after each sublayer (logit lens)",
        "tl-dla lens 'The Eiffel Tower is in the city of' --answer ' Paris'",
        _prompt(),
        _position(),
        _answers("a token to follow"),
        _model(),
        _out(),
        _form(),
    )
    lens.add_argument(
        "--top", type=_count, default=3, metavar="K", help="predictions a point (default 3)"
    )
    report = add(
        "report",
        "Write figures, lens, heads and certificate of an attribution to one self-contained page",
        f"{_IOI.format('report')} --answer ' Mary' --incorrect ' John' --out page.html",
        _prompt(),
        _position(),
        _answers("the model's own top prediction without it"),
        _model(),
        _unit(),
        _choice(),
    )
    report.add_argument("--out", required=True, metavar="FILE", help="the HTML page to write")
    report.add_argument(
        "--top", type=_count, default=3, metavar="K", help="heads of either sign (default 3)"
    )
    add(
        "check",
        "Where a model first departs from what attribution takes for granted (exit code 1)",
        "tl-dla check 'The Eiffel Tower is in the city of' --model smollm2",
        _prompt(),
        _model(),
        _out(),
        _form(),
    )
    dataset = add(
        "dataset",
        "Attribute every prompt of a file, and give the statistics of each row",
        "tl-dla dataset prompts.jsonl --model smollm2 --unit head --batch-size 16 --out runs/ioi",
        _model(),
        _unit(),
        _form(),
    )
    dataset.add_argument(
        "source",
        metavar="PROMPTS",
        help=".jsonl or .csv with the fields prompt, answer, incorrect, group; or a hub dataset id",
    )
    dataset.add_argument("--split", default="train", help="of a hub dataset (default train)")
    dataset.add_argument("--batch-size", type=_count, default=16, metavar="N", help="default 16")
    dataset.add_argument(
        "--out",
        dest="folder",
        metavar="FOLDER",
        help="keep every prompt's rows there; the same command continues a run that stopped",
    )
    dataset.add_argument(
        "--on-error",
        default="skip",
        choices=["skip", "raise"],
        help="an example that cannot be attributed: leave it out and say so (default), or stop",
    )
    dataset.set_defaults(out=None)
    summarize = add(
        "summarize",
        "The statistics of a folder that `tl-dla dataset` wrote, without the model",
        "tl-dla summarize runs/ioi",
        _out(),
        _form(),
    )
    summarize.add_argument("folder", metavar="FOLDER", help="what --out of `tl-dla dataset` named")
    for statistics in (dataset, summarize):
        statistics.add_argument(
            "--top", type=_count, default=12, metavar="K", help="rows shown (default 12)"
        )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _group() -> _Parser:
    return _Parser(add_help=False)


def _prompt() -> _Parser:
    group = _group()
    group.add_argument("prompt", metavar="PROMPT", help="the text; - reads it from stdin")
    return group


def _position() -> _Parser:
    group = _group()
    group.add_argument(
        "--pos",
        type=int,
        default=-1,
        metavar="P",
        help="position of the prompt, 0 for the first token (default -1, the last)",
    )
    return group


def _answers(answer: str) -> _Parser:
    group = _group()
    answers = group.add_mutually_exclusive_group()
    answers.add_argument("--answer", metavar="TOKEN", help=f"the token whose logit it is; {answer}")
    answers.add_argument(
        "--answer-id", dest="answer", type=int, metavar="ID", help="the same, by id"
    )
    group.add_argument(
        "--incorrect",
        action="append",
        metavar="TOKEN",
        help="a token to compare with; several are averaged; 'mean' is the whole vocabulary's mean",
    )
    group.add_argument(
        "--incorrect-id",
        dest="incorrect",
        action="append",
        type=int,
        metavar="ID",
        help="the same, by id",
    )
    return group


def _model() -> _Parser:
    group = _group()
    group.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help="demo (default), smollm2, gemma3, a folder, a .gguf file or a hub id",
    )
    group.add_argument(
        "--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"]
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: an accelerator if any)")
    return group


def _unit() -> _Parser:
    group = _group()
    units = "component (default), layer, head, neuron, source"
    group.add_argument("--unit", default="component", help=f"what the rows are: {units}")
    return group


def _choice() -> _Parser:
    group = _group()
    group.add_argument(
        "--layer",
        dest="layers",
        action="append",
        type=int,
        metavar="L",
        help="a layer to split, for neuron and source (default all)",
    )
    group.add_argument(
        "--head",
        dest="heads",
        action="append",
        metavar="L9H9",
        help="a head to split, for source (default all)",
    )
    return group


def _out() -> _Parser:
    group = _group()
    group.add_argument("--out", metavar="FILE", help="write there (.json and .csv choose the form)")
    return group


def _form() -> _Parser:
    group = _group()
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything, as JSON")
    form.add_argument("--csv", action="store_true", help="all rows, as CSV")
    return group


def _debugging() -> _Parser:
    group = _group()
    group.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return group
