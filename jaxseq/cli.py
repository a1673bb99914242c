"""The command line: `jaxseq train RECIPE` and `jaxseq sample RUN`.

The flags are the fields of the recipes' config dataclasses. What the user can put right is said in one line on stderr,
with exit status 2; a run stopped by a signal saves and exits with 128 + the signal's number, 130 for Ctrl-C. If the
reader of the output has gone, the command ends quietly with 141, as one that SIGPIPE ends does.
"""

import dataclasses
import io
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union

from jaxseq.recipes import characters
from jaxseq.training.errors import MissingExtra, UserError, require
from jaxseq.training.runs import open_run
from jaxseq.training.signals import Signals, Stopped
from jaxseq.training.writing import Sampling

RECIPES = {"characters": characters}
_BROKEN_PIPE = 128 + 13  # the number of SIGPIPE, which Python ignores and some systems lack


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Sampling):
    """Write new text with a trained model."""

    run: pathlib.Path
    """The folder of the run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line with these arguments, by default those of the process; returns the exit status.

    >>> main(["sample", "no-such-run"])
    2
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a sample may have characters that the terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    status = 0
    try:
        with Signals(exits=True) as signals:
            try:
                status = _status(list(sys.argv[1:] if arguments is None else arguments))
            finally:
                print(end="", flush=True)
        if signals.received:  # too late for a step to stop after it
            return 128 + signals.received
    except OSError as error:  # of the standard output, which Python would try to flush again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE if isinstance(error, BrokenPipeError) else status or _fail(str(error))
    return status


def _status(arguments: list[str]) -> int:
    try:
        _run(arguments)
    except (UserError, MissingExtra) as error:
        return _fail(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Stopped as stopped:
        return 128 + stopped.signum
    return 0


def _fail(message: str) -> int:
    print(f"jaxseq: {message}", file=sys.stderr)
    return 2


def _run(arguments: list[str]) -> None:
    recipes = _choice({name: (recipe.Config, None) for name, recipe in RECIPES.items()})
    commands = _choice({"train": (recipes, "Train a recipe in a new run folder."), "sample": (Sample, None)})
    command = _parse(commands, arguments, "jaxseq")
    if isinstance(command, Sample):
        print(characters.sample(command.run, command))
        return
    (name,) = (name for name, recipe in RECIPES.items() if isinstance(command, recipe.Config))
    if command.resume is not None:
        _check_same_flags(RECIPES[name], command.resume, arguments[2:])
    RECIPES[name].train(command)


def _choice(commands: dict[str, tuple[Any, str | None]]) -> Any:
    """The type that tyro reads as a choice between commands, each the type of its flags and a description."""
    conf = require("tyro").conf
    choices = [
        Annotated[Any, conf.subcommand(name, constructor_factory=lambda flags=flags: flags, description=description)]
        for name, (flags, description) in commands.items()
    ]
    return Union[(*choices, Annotated[None, conf.Suppress])]  # noqa: UP007  (a union of a single choice is none)


def _parse(flags: Any, arguments: list[str], program: str, **options: Any) -> Any:
    tyro = require("tyro")
    return tyro.cli(flags, args=arguments, prog=program, config=(tyro.conf.PositionalRequiredArgs,), **options)


def _check_same_flags(recipe: Any, resume: pathlib.Path, flags: list[str]) -> None:
    """Raises UserError if a flag beside `--resume` is not as it was when the run began."""
    stored = dataclasses.replace(recipe.stored_config(open_run(resume)), run=resume)
    given = _parse(recipe.Config, flags, "jaxseq train", default=stored)
    changed = []
    for field in dataclasses.fields(stored):
        new, old = (_resolved(getattr(config, field.name)) for config in (given, stored))
        if new != old:
            was = "the default" if old is None else old
            changed.append(f"--{field.name.replace('_', '-')} {getattr(given, field.name)} (it began with {was})")
    if changed:
        raise UserError(f"--resume continues {resume} as it began: leave out {', '.join(changed)}")


def _resolved(value: Any) -> Any:
    return value.resolve() if isinstance(value, pathlib.Path) else value
