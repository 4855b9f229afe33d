"""The coordinator's own certificate authority: who may talk to the registrar, and to whom sites do.

::

    pki/ca.key, ca.crt                  signs everything below; ten years
    pki/server.key, server.crt          what sites see on every port; names the hosts of ``init``
    pki/enrolment.key, enrolment.crt    self-signed, for the one port that strangers may reach:
                                        its fingerprint is in the invitation, so a site that has
                                        no certificate of ours yet knows whom it talks to

Keys are EC P-256 in files that only their owner may read. A site's key never comes here: it sends
a signing request, and its certificate carries the name that it was invited under, whatever the
request says.
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from crafts_core.durable import create_secret, write_file
from crafts_server.errors import HomeError, PkiError

CA_DAYS, SERVER_DAYS, SITE_DAYS = 3650, 825, 365
_BACKDATED = timedelta(minutes=5)
"""Certificates start a little early: a site's clock may be behind."""


class Pki:
    """The authority in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, hosts: Sequence[str]) -> "Pki":
        """Make the authority and the coordinator's certificates; what exists is left alone.

        Args:
            folder: Made with mode 0700.
            hosts: Names and addresses under which sites reach the coordinator.

        Raises:
            PkiError: no host.
        """
        if not hosts:
            raise PkiError("name at least one host under which sites reach the coordinator")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        pki = cls(folder)
        if not pki.ca_path.exists():
            (folder / "ca.key").unlink(missing_ok=True)  # of a creation that was interrupted
            key = _new_key(folder / "ca.key")
            name = _name("crafts coordinator CA")
            certificate = (
                _builder(name, name, key.public_key(), CA_DAYS)
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(_usage(signs_certificates=True), critical=True)
                .sign(key, hashes.SHA256())
            )
            _write(pki.ca_path, certificate)
        pki.renew(hosts)
        return pki

    def renew(self, hosts: Sequence[str]) -> None:
        """New server and enrolment certificates where they are missing, old, or name others."""
        ca_key, ca = self._ca_key(), self.ca
        for name in ("server", "enrolment"):
            path = self.folder / f"{name}.crt"
            if path.exists() and _is_current(path, hosts):
                continue
            (self.folder / f"{name}.key").unlink(missing_ok=True)
            key = _new_key(self.folder / f"{name}.key")
            subject = _name(f"crafts coordinator {name}")
            own = name == "enrolment"
            certificate = (
                _builder(subject, subject if own else ca.subject, key.public_key(), SERVER_DAYS)
                .add_extension(x509.SubjectAlternativeName(_hosts(hosts)), critical=False)
                .add_extension(x509.BasicConstraints(ca=own, path_length=None), critical=True)
                .add_extension(_usage(signs_certificates=own), critical=True)
                .add_extension(
                    x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
                )
                .sign(key if own else ca_key, hashes.SHA256())
            )
            _write(path, certificate)

    @property
    def server_expires_at(self) -> datetime:
        """When the certificate that sites see ends; ``renew`` at the next start is in time."""
        pem = (self.folder / "server.crt").read_bytes()
        return x509.load_pem_x509_certificate(pem).not_valid_after_utc

    @property
    def ca_path(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def ca(self) -> x509.Certificate:
        return _read_certificate(self.ca_path)

    @property
    def enrolment_fingerprint(self) -> str:
        """Of the certificate that the enrolment port shows; part of every invitation."""
        return fingerprint(x509.load_pem_x509_certificate(self.pair("enrolment")[1]))

    def pair(self, name: str) -> tuple[bytes, bytes]:
        """PEM of key and certificate of ``server`` or ``enrolment``."""
        try:
            key = (self.folder / f"{name}.key").read_bytes()
            return key, (self.folder / f"{name}.crt").read_bytes()
        except OSError as error:
            raise HomeError(
                f"cannot read {error.filename}: {error.strerror}; run crafts-server init again"
            ) from error

    def sign_site(self, request_pem: bytes, site: str) -> x509.Certificate:
        """A client certificate for ``site`` from its signing request.

        The subject is the invited name, and the request must agree with it; nothing else of the
        request but its key is used.

        Raises:
            PkiError: the request is malformed, not self-signed, for another site, or its key is
                not EC P-256. The sentence is public.
        """
        try:
            request = x509.load_pem_x509_csr(request_pem)
            is_valid = request.is_signature_valid
            key = request.public_key()
        except (ValueError, TypeError, InvalidSignature) as error:
            raise PkiError("the signing request cannot be read") from error
        if not is_valid:
            raise PkiError("the signing request is not signed by its own key")
        if _name(site) != request.subject:
            raise PkiError(f"the invitation is for {site}; make the site home with that name")
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(
            key.curve, ec.SECP256R1
        ):
            raise PkiError("the signing request's key is not EC P-256")
        return (
            _builder(_name(site), self.ca.subject, key, SITE_DAYS)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(self._ca_key(), hashes.SHA256())
        )

    def _ca_key(self) -> ec.EllipticCurvePrivateKey:
        try:
            key = load_pem_private_key((self.folder / "ca.key").read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise HomeError(f"cannot read {self.folder / 'ca.key'}; restore it") from error
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate, 64 hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def common_name(certificate: x509.Certificate) -> str:
    """The one common name of a certificate; empty if there is none."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    create_secret(path, pem)
    return key


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _hosts(hosts: Sequence[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for host in hosts:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            found.append(x509.DNSName(host))
    return found


def _is_current(path: Path, hosts: Sequence[str]) -> bool:
    """Valid for another month, for exactly these hosts."""
    certificate = _read_certificate(path)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    is_young = certificate.not_valid_after_utc > datetime.now(UTC) + timedelta(days=30)
    return is_young and list(names) == _hosts(hosts)


def _write(path: Path, certificate: x509.Certificate) -> None:
    write_file(path, certificate.public_bytes(Encoding.PEM))


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise HomeError(f"cannot read {path}; run crafts-server init again") from error
