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

from tl_dla.cli.arguments import parser
from tl_dla.cli.messages import show_warning, tell
from tl_dla.errors import TlDlaError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0; 1 for a model that fails its check; 2 for what cannot be done (a `TlDlaError`, a file that is
    not there, bad arguments), and 3 for what should not happen, with one line on stderr.

    Args:
        argv: the arguments after the command's name; those of the process by default.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    args.command = shlex.join(["tl-dla", *argv])
    if sys.stderr is None:  # closed: what is told has no reader
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None and args.out is None:
        return _fail("stdout is closed: name a file with --out.", 2, args)
    try:
        from tl_dla.cli import commands

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what libraries tell programmers
            warnings.filterwarnings("always", category=UserWarning, module="tl_dla")
            warnings.showwarning = show_warning
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
