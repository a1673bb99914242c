"""What a user can put right: said in one line, never as a traceback."""

import errno
import importlib
from typing import Any


class UserError(ValueError):
    """Something outside the program is unusable, such as a file, a flag or a full disk; the message is one line.

    The command line prints it to stderr and exits with status 2.
    """


class MissingExtra(ImportError):
    """An optional dependency is not installed; the message names the extra that has it."""


def require(module: str, extra: str = "train") -> Any:
    """The module of that name, imported.

    Raises:
        MissingExtra: if it is not installed, with the command that installs the extra.

    >>> require("json").dumps([1])
    '[1]'
    >>> require("no_such_module", "plots")
    Traceback (most recent call last):
    ...
    jaxseq.training.errors.MissingExtra: no_such_module is not installed: pip install "jaxseq[plots]"
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # a module that is there but lacks one of its own says so itself
        if module.split(".")[0] != (error.name or "").split(".")[0]:
            raise
        message = f'{error.name} is not installed: pip install "jaxseq[{extra}]"'
        raise MissingExtra(message, name=error.name) from None


def require_flag(config: Any, holds: bool, name: str, needed: str) -> None:
    """Raises UserError, naming the flag of the field `name`, unless it `holds` what is `needed`."""
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} must be {needed}, got {getattr(config, name)}")


def disk_is_full(error: BaseException) -> bool:
    """Whether `error` reports a full disk or quota, also where a C++ library has turned it into text.

    >>> disk_is_full(OSError(errno.ENOSPC, "No space left on device")), disk_is_full(OSError(errno.ENOENT, "none"))
    (True, False)
    >>> disk_is_full(ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device"))
    True
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left on device", "Disk quota exceeded"))
