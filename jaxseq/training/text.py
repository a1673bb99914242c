"""Text in, tokens out: reading files, the vocabulary of characters, and the split by position."""

import dataclasses
import hashlib
import importlib
import os
import pathlib
import platform
from typing import NamedTuple

import numpy as np

from jaxseq.training.errors import UserError

UNKNOWN = "\ufffd"


class Text(NamedTuple):
    """A text and where it came from."""

    content: str
    source: str
    skipped: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """The SHA-256 of the text as UTF-8, in hexadecimal."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def read(path: pathlib.Path | None = None) -> Text:
    """The text of a UTF-8 file, of all text files in a folder, or Python's language reference without a path.

    Line ends become `\\n` and a byte order mark is dropped. The files of a folder are read with those of its
    subfolders, in the order of their paths, and joined by a newline; hidden ones, empty ones and those that are not
    UTF-8 text are left out, the latter named in `skipped`.

    Raises:
        UserError: if there is no such file, if it is empty, binary or not UTF-8, or if a folder holds no text file.
    """
    if path is None:
        return python_reference()
    if not path.exists():
        raise UserError(f"there is no file or folder {path}")
    if path.is_dir():
        return _read_folder(path)
    content = _decoded(path)
    if not content.strip():
        raise UserError(f"{path} is empty")
    return Text(content, str(path))


def python_reference() -> Text:
    """The language reference that ships inside Python's standard library, each of its paragraphs once.

    A fifth of `pydoc_data.topics` repeats other topics word for word; left in, the repetitions would carry training
    text into the validation part. The text differs between versions of Python.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    unique: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            unique.setdefault(" ".join(paragraph.split()), paragraph)
    return Text("\n\n".join(unique.values()), f"pydoc_data.topics of Python {platform.python_version()}")


def _read_folder(folder: pathlib.Path) -> Text:
    contents, skipped = [], []
    for path in _files(folder):
        try:
            content = _decoded(path)
        except UserError:
            skipped.append(str(path.relative_to(folder)))
        else:
            if content.strip():
                contents.append(content)
    if not contents:
        others = f" ({len(skipped)} files are not UTF-8 text)" if skipped else ""
        raise UserError(f"the folder {folder} holds no text{others}")
    return Text("\n".join(contents), str(folder), tuple(skipped))


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [pathlib.Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _decoded(path: pathlib.Path) -> str:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 text (byte {error.start}): give a text file, or convert it to UTF-8"
        raise UserError(message) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if "\0" in content:
        raise UserError(f"{path} is binary (it holds a zero byte): give a text file")
    return with_newlines(content)


def with_newlines(content: str) -> str:
    """A text with `\\n` for its line ends, whatever they were."""
    return content.replace("\r\n", "\n").replace("\r", "\n")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Characters as tokens: `characters[i]` is token `i + 1`, and token 0 stands for every other character.

    >>> vocabulary = Vocabulary.of("hello")
    >>> vocabulary.characters, vocabulary.size, vocabulary.encode("hold").tolist()
    ('ehlo', 5, [2, 4, 3, 0])
    >>> vocabulary.decode(vocabulary.encode("hole")), vocabulary.missing("cold")
    ('hole', 'cd')
    """

    characters: str

    @classmethod
    def of(cls, content: str) -> "Vocabulary":
        """The vocabulary of all characters of a text."""
        return cls("".join(sorted(set(content))))

    @property
    def size(self) -> int:
        """The number of tokens, the unknown one included."""
        return len(self.characters) + 1

    def encode(self, content: str) -> np.ndarray:
        """`int32[characters]`; what is not in the vocabulary becomes 0."""
        known, codes = _code_points(self.characters), _code_points(content)
        if not known.size:
            return np.zeros(len(codes), np.int32)
        index = np.minimum(np.searchsorted(known, codes), known.size - 1)
        return np.where(known[index] == codes, index + 1, 0).astype(np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of some tokens; token 0 becomes U+FFFD."""
        symbols = UNKNOWN + self.characters
        return "".join(symbols[token] for token in np.asarray(tokens).tolist())

    def missing(self, content: str) -> str:
        """The characters of a text that the vocabulary does not have, each once, sorted."""
        return "".join(sorted(set(content) - set(self.characters)))


def _code_points(content: str) -> np.ndarray:
    # lone surrogates come from a command line that is not valid UTF-8
    return np.frombuffer(content.encode("utf-32-le", "surrogatepass"), np.uint32)


def split(length: int, fractions: tuple[float, ...]) -> list[int]:
    """The positions at which a text is cut into parts of these fractions, in order; the rest is left out.

    Raises:
        UserError: if a fraction is negative or they sum to more than 1.

    >>> split(1000, (0.9, 0.05, 0.05))
    [900, 950, 1000]
    """
    if min(fractions) < 0 or sum(fractions) > 1 + 1e-9:
        raise UserError(f"the fractions of the text must not be negative nor sum to more than 1, got {fractions}")
    return [round(length * sum(fractions[: part + 1])) for part in range(len(fractions))]
