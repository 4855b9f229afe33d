"""Which scanner made a slide: a word from a closed list.

The fields for make and model are free text, and hospitals write serial numbers and names into
them. What is not on the list is not repeated.
"""

import re

UNKNOWN = "unknown"

_VENDORS = {
    "3dhistech": "3DHISTECH",
    "mirax": "3DHISTECH",
    "akoya": "Akoya",
    "perkinelmer": "Akoya",
    "aperio": "Leica",
    "leica": "Leica",
    "dakewe": "Dakewe",
    "fujifilm": "Fujifilm",
    "grundium": "Grundium",
    "hamamatsu": "Hamamatsu",
    "huron": "Huron",
    "kfbio": "KFBIO",
    "motic": "Motic",
    "olympus": "Olympus",
    "evident": "Olympus",
    "philips": "Philips",
    "pramana": "Pramana",
    "roche": "Roche",
    "ventana": "Roche",
    "sakura": "Sakura",
    "trestle": "Trestle",
    "zeiss": "Zeiss",
}
_MODELS = (
    "AxioScan Z1",
    "Axioscan 7",
    "AT2",
    "AT Turbo",
    "BF450",
    "C9600",
    "C10730",
    "C12000",
    "C13210",
    "C13220",
    "C13239",
    "C16300",
    "CS2",
    "DP 200",
    "DP 600",
    "GT 450",
    "GT 450 DX",
    "GT450",
    "GT450 DX",
    "iScan Coreo",
    "iScan HT",
    "LV1",
    "NanoZoomer",
    "NanoZoomer S20",
    "NanoZoomer S210",
    "NanoZoomer S360",
    "NanoZoomer S60",
    "NanoZoomer SQ",
    "NanoZoomer XR",
    "Ocus",
    "Ocus 20",
    "Ocus 40",
    "Pannoramic 1000",
    "Pannoramic 250",
    "Pannoramic 480",
    "Pannoramic DESK",
    "Pannoramic MIDI",
    "Pannoramic SCAN",
    "PhenoImager",
    "SCN400",
    "SG20",
    "SG300",
    "SG60",
    "Ultra Fast Scanner",
    "UFS",
    "Vectra Polaris",
    "VersaScan",
    "VS120",
    "VS200",
    "VisionTek",
)


def known_scanner(*texts: object) -> str:
    """Vendor and model that these fields name, ``"unknown"`` where the list has none of them."""
    text = " ".join(str(text) for text in texts if text)[:1000].lower()
    vendors = [name for word, name in _VENDORS.items() if word in text]
    models = [model for model in _MODELS if _has_words(text, model.lower())]
    words = [*vendors[:1], max(models, key=len, default="")]
    return " ".join(word for word in words if word) or UNKNOWN


def _has_words(text: str, words: str) -> bool:
    return re.search(rf"(?<![a-z0-9]){re.escape(words)}(?![a-z0-9])", text) is not None
