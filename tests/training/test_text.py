import pathlib

import numpy as np
import pytest

from jaxseq.training import text
from jaxseq.training.errors import UserError


def test_the_default_text_is_real_and_says_nothing_twice():
    reference = text.read()
    paragraphs = [" ".join(paragraph.split()) for paragraph in reference.content.split("\n\n")]
    assert len(reference.content) > 300_000 and 'The "while" statement' in reference.content
    assert len(set(paragraphs)) == len(paragraphs)
    assert reference.fingerprint() == text.read().fingerprint()


def test_files_are_read_as_utf8_with_any_line_ends(tmp_path: pathlib.Path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\none\rtwo\n")
    assert text.read(path).content == "naïve\none\ntwo\n"


def test_a_folder_is_read_in_order_without_what_is_not_text(tmp_path: pathlib.Path):
    for name, content in {
        "b.txt": b"second",
        "a/z.md": b"first",
        "picture.png": b"\x89PNG\xff\xfe",
        "zeros": b"a\0b",
        "empty.txt": b" \n",
        ".hidden": b"no",
        ".git/config": b"no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = text.read(tmp_path)
    assert found.content == "first\nsecond"
    assert found.skipped == ("picture.png", "zeros")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"plain \xff\xfe", r"is not UTF-8 text \(byte 6\)"),
        (b"plain \0 text", "is binary"),
        (None, "there is no file or folder"),
    ],
)
def test_unusable_files_are_refused(tmp_path: pathlib.Path, content: bytes | None, message: str):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        text.read(path)


def test_a_folder_without_text_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match=r"holds no text$"):
        text.read(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"holds no text \(1 files are not UTF-8 text\)"):
        text.read(tmp_path)


def test_vocabularies_encode_and_decode_any_script():
    content = "naïve 文字 🎉\n"
    vocabulary = text.Vocabulary.of(content)
    tokens = vocabulary.encode(content)
    assert tokens.dtype == np.int32 and tokens.min() == 1 and tokens.max() == vocabulary.size - 1
    assert vocabulary.decode(tokens) == content
    assert vocabulary.encode("z\udc80").tolist() == [0, 0] and vocabulary.decode(np.array([0])) == text.UNKNOWN
    assert text.Vocabulary("").encode("ab").tolist() == [0, 0] and vocabulary.encode("").tolist() == []


def test_splits_are_by_position_and_refuse_impossible_fractions():
    assert text.split(7, (0.5, 0.25, 0.25)) == [4, 5, 7]
    assert text.split(100, (0.5, 0.2, 0.0)) == [50, 70, 70]
    for fractions in ((0.9, 0.2, 0.0), (1.2, -0.3, 0.1)):
        with pytest.raises(UserError, match="must not be negative nor sum to more than 1"):
            text.split(10, fractions)
