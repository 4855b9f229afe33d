"""Public keys of sites' Flower nodes: OpenSSH text, one line, EC P-256."""

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from crafts_server.errors import EnrolmentError

_MAX_CHARACTERS = 512


def check_node_key(text: str) -> None:
    """Refuse what is no key of the kind that the SuperLink checks.

    Raises:
        EnrolmentError: the sentence is public.
    """
    try:
        if len(text) > _MAX_CHARACTERS:
            raise ValueError
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EnrolmentError("the node's public key cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise EnrolmentError("the node's public key is not EC P-256")
