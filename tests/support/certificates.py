"""Certificates of enrolled sites that end when a test wants them to."""

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding


def write_certificate(home: Path, *, ends_in: timedelta) -> None:
    """A certificate of nobody's in the place of the site's own."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=400))
        .not_valid_after(now + ends_in)
        .sign(key, hashes.SHA256())
    )
    (home / "keys").mkdir(exist_ok=True)
    (home / "keys" / "tls.crt").write_bytes(certificate.public_bytes(Encoding.PEM))


def identity_of(number: int) -> str:
    """Where nothing is signed: what looks like a site's public key."""
    return base64.b64encode(bytes([number]) * 32).decode()
