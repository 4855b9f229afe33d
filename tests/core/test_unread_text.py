"""The end of a text that a text tower does not read is just what its tokens do not hold."""

import pytest

from crafts_core.aligner import tokenize
from crafts_core.foundation import Foundation
from crafts_core.unread_text import unread_tails

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
