"""What a site keeps of its coordinator, and what of an answer to an enrolment it takes for that.

The answer is the word of whoever showed the invitation's certificate. Each field is checked before
anything is kept: it ends up in requests, configuration and on screens.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from crafts_client.errors import EnrolmentError
from crafts_core.fields import Name, Sha256, describe_first_error
from crafts_privacy import signing

_MOST_PEM_BYTES = 16 * 1024


def _reachable_port(address: str) -> str:
    if not 0 < int(address.rpartition(":")[2]) < 1 << 16:
        raise ValueError("expected a port from 1 to 65535")
    return address


def _public_key(text: str) -> str:
    try:
        signing.fingerprint(text)
    except signing.SignatureError as error:
        raise ValueError(str(error)) from error
    return text


_Address = Annotated[
    str,
    Field(pattern=r"^([A-Za-z0-9._:-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}$"),
    AfterValidator(_reachable_port),
]


class CoordinatorRecord(BaseModel):
    """``coordinator.json``: where the coordinator is, as it said at enrolment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    site: Name
    signer: Annotated[str, AfterValidator(_public_key)]
    registrar_address: _Address
    fleet_address: _Address
    ca_fingerprint: Sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """An answer that was checked."""

    record: CoordinatorRecord
    ca_pem: bytes
    certificate_pem: bytes


def checked_reply(reply: Any, *, site: str, key: ec.EllipticCurvePublicKey) -> Enrolled:
    """Accept an ``EnrolReply`` only if every field is what it must be.

    Args:
        reply: The message.
        site: Who asked.
        key: Of whom the certificate must be.

    Raises:
        EnrolmentError: names the first field that is not.
    """
    ca = _certificate(reply.ca_pem, "ca_pem")
    certificate = _certificate(reply.certificate_pem, "certificate_pem")
    try:
        record = CoordinatorRecord(
            site=reply.site,
            signer=reply.signer,
            registrar_address=reply.registrar_address,
            fleet_address=reply.fleet_address,
            ca_fingerprint=ca.fingerprint(hashes.SHA256()).hex(),
        )
    except ValidationError as error:
        raise _refused(describe_first_error(error)) from error
    if record.site != site:
        raise _refused(f"site: expected {site}")
    if not _is_authority(ca):
        raise _refused("ca_pem: expected the certificate of an authority, signed by itself")
    if certificate.public_key() != key:
        raise _refused("certificate_pem: it is not of the key that this site has made")
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if [name.value for name in names] != [site] or not _has_issued(ca, certificate):
        raise _refused(f"certificate_pem: expected one of {site} by that authority")
    return Enrolled(
        record=record,
        ca_pem=ca.public_bytes(Encoding.PEM),
        certificate_pem=certificate.public_bytes(Encoding.PEM),
    )


def _certificate(pem: bytes, field: str) -> x509.Certificate:
    """The one certificate of a field; what else a PEM file may hold is not kept."""
    try:
        if len(pem) > _MOST_PEM_BYTES:
            raise ValueError
        (certificate,) = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise _refused(f"{field}: expected one certificate in PEM") from error
    return certificate


def _is_authority(ca: x509.Certificate) -> bool:
    try:
        constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return False
    return constraints.ca and _has_issued(ca, ca)


def _has_issued(ca: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _refused(what: str) -> EnrolmentError:
    return EnrolmentError(
        f"the coordinator's answer cannot be used: {what}; nothing was kept, ask its operator"
    )
