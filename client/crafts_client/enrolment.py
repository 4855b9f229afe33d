"""Becoming a site of a coordinator, and talking to its registrar afterwards.

The invitation names the coordinator's address and a token of two parts: a secret, and the SHA-256
of the certificate that the enrolment port shows. So the site knows whom it talks to before it
trusts anything, and what it gets over that connection (the authority's certificate) it keeps.
Private keys are made here and never leave.

::

    keys/tls.key, tls.crt    the site's client certificate
    keys/ca.crt              the coordinator's authority
    keys/node.key            EC P-256, OpenSSH: the Flower node's
    keys/site.key            made before, if it is not there: the coordinator gets its public half
    coordinator.json         addresses and the signer's public key
"""

import hashlib
import http.client
import logging
import os
import ssl
from typing import Any, Self

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from crafts_client.coordinator_record import CoordinatorRecord, checked_reply
from crafts_client.errors import CoordinatorBusyError, EnrolmentError, LeftError, RevokedError
from crafts_client.home import SiteHome
from crafts_client.proxies import proxy_for, way
from crafts_client.site_key import site_key
from crafts_client.site_ledger import existing_ledger
from crafts_core.durable import write_file
from crafts_core.harmless import harmless
from crafts_core.registrar import ENROLMENT, REGISTRAR, calls_of, messages
from crafts_core.roster import identity_words
from crafts_privacy import signing

log = logging.getLogger(__name__)

DEFAULT_PORT = 8444
TIMEOUT_S = 30.0
_MOST_SAID = 300
"""Letters of a sentence of the coordinator."""
_STATUS_IS_PUBLIC = {
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNAUTHENTICATED,
}


def enrol(home: SiteHome, host: str, token: str) -> CoordinatorRecord:
    """Trade an invitation for a certificate, with new keys.

    Keys of an earlier enrolment are replaced once the coordinator has answered, never used again:
    a key that was revoked stays revoked.

    Args:
        home: The site's home; the invitation must be for its name and its declared patients.
        host: ``host`` or ``host:port`` of the coordinator's enrolment.
        token: As ``crafts-server sites invite`` printed it.

    Raises:
        EnrolmentError: says what is wrong and who can help.
    """
    secret, _, wanted = token.strip().partition(".")
    if len(wanted) != 64:
        raise EnrolmentError("this is no whole token; copy it as crafts-server sites invite has it")
    name, port = _host_and_port(host)
    pem = _certificate_shown(name, port)
    shown = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
    if shown != wanted:
        raise EnrolmentError(
            f"{name}:{port} shows another certificate ({shown}) than the invitation names "
            f"({wanted}): a token that was not copied whole, a wrong host, or TLS inspection on "
            "the way; ask your network people"
        )
    identity = site_key(home, existing_ledger(home))
    tls_key, node_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    request = messages.EnrolRequest(
        token=secret,
        signing_request_pem=_signing_request(tls_key, home.config.name),
        node_public_key=_public_text(node_key),
        declared_patients=home.config.declared_patients,
        identity_public_key=signing.public_key_of(identity),
        identity_signature=signing.sign(identity, identity_words(home.config.name)),
    )
    credentials = grpc.ssl_channel_credentials(root_certificates=pem.encode())
    with _channel(f"{name}:{port}", credentials) as channel:
        reply = _call(channel, ENROLMENT, "Enrol", request, at=f"{name}:{port}")
    enrolled = checked_reply(reply, site=home.config.name, key=tls_key.public_key())
    record = enrolled.record
    keys = home.path / "keys"
    keys.mkdir(mode=0o700, exist_ok=True)
    for name, key, form in (
        ("tls.key", tls_key, PrivateFormat.PKCS8),
        ("node.key", node_key, PrivateFormat.OpenSSH),
    ):
        write_file(keys / name, key.private_bytes(Encoding.PEM, form, NoEncryption()), mode=0o600)
    write_file(keys / "ca.crt", enrolled.ca_pem)
    write_file(keys / "tls.crt", enrolled.certificate_pem)
    if _authority(home) != record.ca_fingerprint:
        # Who takes part in another coordinator's studies is not this one's business.
        home.peer_heads_path.unlink(missing_ok=True)
    write_file(home.coordinator_path, record.model_dump_json(indent=1) + "\n")
    return record


class Registrar:
    """The coordinator's registrar, as an enrolled site sees it."""

    def __init__(self, home: SiteHome) -> None:
        """Read the home's keys.

        Raises:
            EnrolmentError: the site is not enrolled.
        """
        self.record = coordinator_record(home)
        keys = home.path / "keys"
        try:
            credentials = grpc.ssl_channel_credentials(
                root_certificates=(keys / "ca.crt").read_bytes(),
                private_key=(keys / "tls.key").read_bytes(),
                certificate_chain=(keys / "tls.crt").read_bytes(),
            )
        except OSError as error:
            raise EnrolmentError(
                f"cannot read {error.filename}: {error.strerror}; enroll again"
            ) from error
        self._channel = _channel(self.record.registrar_address, credentials)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def call(self, name: str, **fields: object) -> Any:
        """One call of the contract.

        Raises:
            EnrolmentError: the coordinator refuses, or cannot be reached.
            CoordinatorBusyError: it failed; ask again.
        """
        request = calls_of(REGISTRAR)[name].request(**fields)
        return _call(self._channel, REGISTRAR, name, request, at=self.record.registrar_address)


def publish_identity(home: SiteHome) -> str:
    """Tell the coordinator which key signs for this site; the key's fingerprint.

    Raises:
        EnrolmentError: the coordinator cannot be reached or refuses.
    """
    key = site_key(home, existing_ledger(home))
    public_key = signing.public_key_of(key)
    with Registrar(home) as registrar:
        registrar.call(
            "PublishIdentity",
            identity_public_key=public_key,
            identity_signature=signing.sign(key, identity_words(home.config.name)),
        )
    return signing.fingerprint(public_key)


def coordinator_record(home: SiteHome) -> CoordinatorRecord:
    """What was agreed at enrolment.

    Raises:
        EnrolmentError: nothing was, or the file is damaged.
    """
    try:
        return CoordinatorRecord.model_validate_json(home.coordinator_path.read_bytes())
    except FileNotFoundError as error:
        raise EnrolmentError(
            "this site is not enrolled; run: crafts-client enroll HOST --token TOKEN"
        ) from error
    except (OSError, ValidationError) as error:
        raise EnrolmentError(f"cannot read {home.coordinator_path}; enroll again") from error


def certificate_of(home: SiteHome) -> bytes:
    """What the site shows to the coordinator; another one once it has enrolled anew.

    Raises:
        LeftError: there is none any more.
    """
    try:
        return (home.path / "keys" / "tls.crt").read_bytes()
    except FileNotFoundError as error:
        raise LeftError("this site has left its coordinator") from error


def end_if_revoked(home: SiteHome, certificate: bytes) -> None:
    """Ask whether this site still takes part; a coordinator that is away has not said no.

    Args:
        home: Of the site.
        certificate: ``certificate_of`` it when taking part began.

    Raises:
        LeftError: it left meanwhile, and perhaps enrolled anew.
        RevokedError: it was revoked.
    """
    if certificate_of(home) != certificate:
        raise LeftError("this site was enrolled anew; start crafts-client join again")
    try:
        with Registrar(home) as registrar:
            registrar.call("DeclarePatients")
    except RevokedError:
        raise
    except EnrolmentError as error:
        log.warning("the coordinator cannot be asked yet: %s", type(error).__name__)


def forget_coordinator(home: SiteHome) -> None:
    """Remove what belongs to the coordinator. Again is fine."""
    home.coordinator_path.unlink(missing_ok=True)
    home.peer_heads_path.unlink(missing_ok=True)
    for name in ("tls.key", "tls.crt", "node.key", "ca.crt"):
        (home.path / "keys" / name).unlink(missing_ok=True)


def _authority(home: SiteHome) -> str:
    """Of the coordinator so far; empty if there is none."""
    try:
        return coordinator_record(home).ca_fingerprint
    except EnrolmentError:
        return ""


def _channel(address: str, credentials: grpc.ChannelCredentials) -> grpc.Channel:
    """Through the proxy or not, as ``proxies`` says; what gRPC reads by itself is switched off."""
    proxy = proxy_for(address, os.environ)
    options: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]
    if proxy is None:
        return grpc.secure_channel(address, credentials, options)
    options += [
        ("grpc.http_connect_server", address),
        ("grpc.default_authority", address),  # whose certificate it must be
        *(("grpc.http_connect_headers", f"{key}:{text}") for key, text in proxy.headers.items()),
    ]
    return grpc.secure_channel(f"dns:///{proxy.address}", credentials, options)


def _call(channel: grpc.Channel, service: str, name: str, request: Any, *, at: str) -> Any:
    call = calls_of(service)[name]
    stub = channel.unary_unary(
        call.path,
        request_serializer=call.request.SerializeToString,
        response_deserializer=call.reply.FromString,
    )
    try:
        return stub(request, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        said = f"the coordinator says: {harmless(error.details() or '', most=_MOST_SAID)}"
        if error.code() == grpc.StatusCode.INTERNAL:
            raise CoordinatorBusyError(said) from error
        if service == REGISTRAR and error.code() == grpc.StatusCode.PERMISSION_DENIED:
            raise RevokedError(said) from error
        if error.code() in _STATUS_IS_PUBLIC:
            raise EnrolmentError(said) from error
        raise EnrolmentError(
            f"the coordinator cannot be reached at {at} {way(proxy_for(at, os.environ))}; "
            "run crafts-client doctor to see why"
        ) from error


def _host_and_port(text: str) -> tuple[str, int]:
    name, _, port = text.rpartition(":") if ":" in text else (text, "", "")
    if (port and not port.isdigit()) or ":" in name or not name:
        raise EnrolmentError(f"expected HOST or HOST:PORT, a name or IPv4 address, got {text!r}")
    return name, int(port) if port else DEFAULT_PORT


def _certificate_shown(name: str, port: int) -> str:
    """PEM of what the port shows, trusted by nobody yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    proxy = proxy_for(f"{name}:{port}", os.environ)
    first = (proxy.host, proxy.port) if proxy else (name, port)
    connection = http.client.HTTPSConnection(*first, context=context, timeout=TIMEOUT_S)
    if proxy:
        connection.set_tunnel(name, port, proxy.headers)
    try:
        connection.connect()
        certificate = connection.sock.getpeercert(binary_form=True)
        return ssl.DER_cert_to_PEM_cert(certificate or b"")
    except (OSError, http.client.HTTPException) as error:
        reason = type(error).__name__
        if isinstance(error, OSError):
            reason = error.strerror or harmless(str(error)) or reason
        advice = f"check {proxy.variable}" if proxy else "check host, port and firewall"
        raise EnrolmentError(
            f"cannot reach {name}:{port} {way(proxy)} ({reason}); {advice}"
        ) from error
    finally:
        connection.close()


def _public_text(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _signing_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
