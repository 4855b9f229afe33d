"""The end of a text that a text tower does not read is just what its tokens do not hold."""

import struct

import pytest
from tokenizers import normalizers
from transformers import T5Tokenizer

from crafts_core.aligner import check_vocabulary, tokenize
from crafts_core.foundation import Foundation
from crafts_core.unread_text import unread_tails
from support.foundations import tiny_t5_tokenizer

LONG = "H&E,  colon " + "Glands with moderate atypia, " * 12 + "Necrosis"


@pytest.mark.parametrize("max_tokens", [8, 20, 32])
def test_what_is_read_and_what_is_left_out_are_the_text(
    foundation: Foundation, max_tokens: int
) -> None:
    tokenizer = foundation.generator.tokenizer
    [tail] = unread_tails(tokenizer, [LONG], max_tokens)
    head = LONG.removesuffix(tail)
    assert tail.endswith("Necrosis")
    assert unread_tails(tokenizer, [head], max_tokens) == [""]
    read, whole = (tokenize(tokenizer, [text], max_tokens) for text in (head, LONG))
    assert read[:, :-2].equal(whole[:, :-2])  # a word that is cut ends in another token


def test_a_short_text_is_read_whole(foundation: Foundation) -> None:
    texts = ["", "H&E, colon adenocarcinoma, colon"]
    assert unread_tails(foundation.generator.tokenizer, texts, 32) == ["", ""]
    assert unread_tails(foundation.generator.tokenizer, [], 32) == []


def test_a_tokenizer_that_panics_over_one_text_is_an_error() -> None:
    """One that passes every ``except Exception`` would end an ingest for one patient's caption."""
    tokenizer = _panics_over("7")
    assert len(tokenize(tokenizer, ["lung, grade 6"], 20)) == 1
    for text in ("lung, grade 7", "7"):
        with pytest.raises(RuntimeError, match="panicked"):
            tokenize(tokenizer, [text], 20)
        with pytest.raises(RuntimeError, match="panicked"):
            unread_tails(tokenizer, [text], 20)


@pytest.mark.parametrize("length", [33, 100_000])
def test_a_tokenizer_that_makes_a_book_of_one_letter_is_refused(length: int) -> None:
    """A caption with that letter, and no other, would take all memory."""
    tokenizer = _with_table("7", end=1 << 31, becomes=b"x" * length)
    assert len(tokenize(tokenizer, ["7"], 20)) == 1
    if length < 256:
        check_vocabulary(tokenizer, len(tokenizer))
        return
    with pytest.raises(ValueError, match="one letter"):
        check_vocabulary(tokenizer, len(tokenizer))


def _panics_over(letter: str) -> T5Tokenizer:
    """Its table of characters, which comes with a foundation, leads beyond its end from one."""
    return _with_table(letter, leads_to=2**21 - 1)


def _with_table(
    letter: str, *, leads_to: int = 0, end: int = 0, becomes: bytes = b"x"
) -> T5Tokenizer:
    """A table in which one letter has an entry (the double array of SentencePiece)."""
    first, last = 256, 512
    place = first ^ ord(letter)
    units = [0] * 1024
    units[0] = first << 10
    units[place] = (leads_to or last ^ place) << 10 | 1 << 8 | ord(letter)
    units[last] = end
    table = struct.pack(f"<{1 + len(units)}I", 4 * len(units), *units)
    tokenizer = tiny_t5_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Precompiled(table + becomes + b"\0")
    return tokenizer
