"""The command line: one thin layer over ``kvplan``'s public functions, and one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import gc
import os
import sys

GARBAGE_THRESHOLD = 50_000
"""Objects made before garbage is looked for: start-up makes many and drops none, so looking would only cost time."""

CLOSED_PIPE = 141
"""Exit code when the reader of stdout went away: 128 + SIGPIPE, what shells report for other programs."""

MAX_WORD_CHARS = 240
"""Longest word of an error: a path, or what was typed."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


def main() -> None:
    """Run the command line; the ``kvplan`` script calls this."""
    gc.set_threshold(GARBAGE_THRESHOLD)
    try:
        _run()
    finally:
        gc.freeze()  # or the interpreter looks through all that there is for garbage before it leaves, for 40 ms


def _run() -> None:
    from kvplan.errors import KvplanError, reason

    _usable_surroundings()
    try:
        from kvplan.cli.commands import COMMANDS, make_app

        named = sys.argv[1:2]
        app = make_app(named if named and named[0] in COMMANDS else COMMANDS)
        code = app(standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # the option parser catches Ctrl-C and says nothing
            print("interrupted", file=sys.stderr)
    except KvplanError as error:
        report_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        _drop_stdout()
        sys.exit(CLOSED_PIPE)
    except OSError as error:  # files say so themselves; what is left and names no file is the disk under stdout
        _drop_stdout()
        what = "output cannot be written" if error.filename is None else str(error.filename)
        report_error(KvplanError(f"{what}: {reason(error)}"))
        sys.exit(KvplanError.exit_code)
    except MemoryError:
        report_error(KvplanError("out of memory", hint="a smaller input, or one that ends"))
        sys.exit(KvplanError.exit_code)
    except SystemExit as stop:  # the option parser turns a closed pipe into 1, which here means "the answer is no"
        sys.exit(CLOSED_PIPE if isinstance(stop.__context__, BrokenPipeError) else stop.code)
    except Exception as error:
        sys.exit(_usage_error(error))
    sys.exit(code if isinstance(code, int) else 0)


def _usable_surroundings() -> None:
    """Streams that were closed lead nowhere and others take every sign; a width that is no number is none."""
    from kvplan.terminal.spelling import make_encodable

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the whole run
        make_encodable(getattr(sys, name))
    if os.environ.get("NO_COLOR"):
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # help without weight too
    columns = os.environ.get("COLUMNS", "")
    if not (columns.isascii() and columns.isdigit()):
        os.environ.pop("COLUMNS", None)


def _drop_stdout() -> None:
    """What is still buffered goes nowhere, so that nothing fails again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage_error(error: Exception) -> int:
    """One line for what the option parser refuses; anything else is a bug and goes on."""
    kind = type(error).__name__
    if kind == "NoArgsIsHelpError" and hasattr(error, "show"):
        error.show(sys.stderr)
        return 2
    if kind == "Abort":
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if not hasattr(error, "format_message"):
        raise error
    context = getattr(error, "ctx", None)
    command = " ".join(["kvplan", *(word for word in sys.argv[1:2] if word.isalpha())])
    path = context.command_path if context is not None else command
    message = " ".join(str(error.format_message()).split()).rstrip(".")
    for jargon, plain in (("valid int", "whole number"), ("valid float", "number")):
        message = message.replace(f"is not a {jargon} range", f"is not a {jargon}")
        message = message.replace(f"is not a {jargon}", f"is not a {plain}")
    from kvplan.errors import InputError

    takes_model = context is not None and any("--model" in parameter.opts for parameter in context.command.params)
    instead = "write --model NAME, or " if takes_model and "unexpected extra argument" in message else ""
    report_error(InputError(message[:1].lower() + message[1:], hint=f"{instead}see `{path} --help`"))
    return int(getattr(error, "exit_code", 2))


def report_error(error: object) -> None:
    """One printable line on stderr: what, why, what to try; a word that fills screens is cut."""
    from kvplan.errors import KvplanError, shorten

    assert isinstance(error, KvplanError)
    from kvplan.cli.stated import in_options
    from kvplan.terminal.console import is_styled

    label = "\x1b[31merror:\x1b[0m" if is_styled(sys.stderr) else "error:"
    hint = f" ({error.hint})" if error.hint else ""
    with contextlib.suppress(OSError):  # a full disk under stderr changes no exit code
        line = in_options(error.message + hint, sys.argv[1:])
        words = (shorten(word, MAX_WORD_CHARS) for word in line.split(" "))
        print(label, *words, file=sys.stderr, flush=True)
