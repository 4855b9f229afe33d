"""What somebody else wrote, as plain letters on one line: it acts on no terminal, log or page.

Names, reasons and keys of a coordinator, a site, a plan or a table are text of whoever wrote them.
Shown as they are, an escape sequence could erase or fake a line, a newline could add one, and marks
of direction could turn the order of letters round. So the programs print, log and render such text
through ``harmless`` and nothing else (``command_line.say``, its log format, ``pages``).
"""

import json

MOST_OF_A_SENTENCE = 2000
"""Letters of an error or a log line that a person still reads."""


def harmless(text: str, *, most: int | None = None) -> str:
    r"""``text`` on one line, each letter that does not print written as JSON writes it.

    Those are controls, ends of lines and paragraphs, marks of direction, surrogates, and every
    space but the plain one. What prints stays as it is, so JSON stays the same JSON, and text that
    went through once does not change again.

    Args:
        text: Of anybody.
        most: Letters that are kept; what follows is said to be left out.
    """
    cut = "" if most is None or len(text) <= most else f" ... ({len(text) - most} letters more)"
    shown = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text[:most])
    return shown + cut
