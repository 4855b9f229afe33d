"""What of a text is left out, because a text tower reads so many tokens and no more."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from crafts_core.panics import panics_as_errors
from crafts_core.quiet import quiet_transformers


def unread_tails(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int
) -> list[str]:
    """The end of each text that ``tokenize`` cuts off; empty where all of it is read."""
    if not texts:
        return []
    most = (
        min(max_tokens, int(tokenizer.model_max_length)) - tokenizer.num_special_tokens_to_add()
    )  # what begins and ends
    with quiet_transformers(), panics_as_errors():
        places = tokenizer(
            list(texts), add_special_tokens=False, truncation=False, return_offsets_mapping=True
        )["offset_mapping"]
    return [
        text[spans[most][0] :].strip() if len(spans) > most else ""
        for text, spans in zip(texts, places, strict=True)
    ]
