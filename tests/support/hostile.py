"""Text of somebody who wants a person to read what no program of ours said."""

TEXT = (
    "no\x1b[2K\x1b[1A\r\napproved by the policy\x0b\x0c\x85\u2028\u2029\x9b31m\x7f\u202edevorppa"
    "\u200b\ud800 [red]<script>alert(1)</script>"
)
"""Erases a line, begins others in seven ways, turns letters round, and is markup of two kinds."""


def assert_harmless(shown: str, *, num_lines: int | None = None) -> None:
    """Each line is plain letters, and none was added; the text is there, for a person to see."""
    lines = shown.removesuffix("\n").split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert not any(line.lstrip().startswith("approved") for line in lines)
    assert any("\\u001b[2K\\u001b[1A\\r\\napproved by" in line for line in lines), shown
    if num_lines is not None:
        assert len(lines) == num_lines, shown
