"""Names of what file servers, desktops and copying programs leave beside slides.

Such files are no part of a slide, come and go without anybody's doing, and often look like slides:
a recycle bin holds old ones, an index folder has a thumbnail for each.
"""

_NAMES = frozenset({
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "@sharebin", "#recycle", "#snapshot",
    "~snapshot", "$recycle.bin", "system volume information", "recycler", "lost+found",
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "network trash folder", "icon\r",
})  # fmt: skip
"""Of Synology, QNAP, NetApp, Windows, Linux and Macs, in small letters."""
_BEGINNINGS = (".", "~$", "@__thumb")
"""Hidden files are these too: .DS_Store, ._slide.svs, .Trash-1000, .snapshot, .git."""
_ENDINGS = ("@synoeastream", "@synoresource", "~")
_UNFINISHED = (
    ".part", ".partial", ".crdownload", ".download", ".filepart", ".tmp", ".temp", ".opdownload",
    ".!ut", ".aria2", ".incomplete", ".unfinished",
)  # fmt: skip


def is_housekeeping(name: str) -> bool:
    """Whether a file or folder of this name belongs to a program, not to a person."""
    small = name.lower()
    return small in _NAMES or small.startswith(_BEGINNINGS) or small.endswith(_ENDINGS)


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is still being copied, or its copy was given up."""
    return name.lower().endswith(_UNFINISHED)
