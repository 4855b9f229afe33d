"""No field of an answer to an enrolment is kept before it was checked."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import CertificateSigningRequestBuilder, Name, NameAttribute
from cryptography.x509.oid import NameOID

from crafts_client.coordinator_record import checked_reply
from crafts_client.errors import EnrolmentError
from crafts_core.registrar import messages
from crafts_server.pki import Pki, fingerprint
from support.hostile import TEXT

KEY = ec.generate_private_key(ec.SECP256R1())
SENT = TEXT.replace("\ud800", "")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.create(tmp_path_factory.mktemp("pki") / "ours", ["localhost"])


def certificate(pki: Pki, name: str = "north", key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    subject = Name([NameAttribute(NameOID.COMMON_NAME, name)])
    request = CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return pki.sign_site(request.public_bytes(Encoding.PEM), name).public_bytes(Encoding.PEM)


def answer(pki: Pki, **changes: object):
    values: dict[str, object] = {
        "site": "north",
        "ca_pem": pki.ca_path.read_bytes(),
        "certificate_pem": certificate(pki),
        "signer": "A" * 43 + "=",
        "registrar_address": "coordinator.example.org:8445",
        "fleet_address": "[2001:db8::1]:8443",
    }
    return messages.EnrolReply(**values | changes)


def test_an_honest_answer_is_kept_without_what_else_its_files_hold(authority: Pki) -> None:
    padded = b"\x1b[2J approved\n" + authority.ca_path.read_bytes()
    enrolled = checked_reply(answer(authority, ca_pem=padded), site="north", key=KEY.public_key())
    assert enrolled.ca_pem == authority.ca_path.read_bytes()
    assert enrolled.record.ca_fingerprint == fingerprint(authority.ca)
    assert enrolled.record.fleet_address == "[2001:db8::1]:8443"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("site", text) for text in ("south", "", SENT, "north\n")),
        *(("signer", text) for text in ("", SENT, "A" * 44, "A" * 43 + "=\n", "A" * 42 + "B=")),
        *(
            (field, text)
            for field in ("registrar_address", "fleet_address")
            for text in ("", SENT, "host", "host:0", "host:65536", "a b:1", "h:1\n", "dns:///h:1")
        ),
        *(("ca_pem", pem) for pem in (b"", SENT.encode(), b"-" * 20_000)),
        *(("certificate_pem", pem) for pem in (b"", SENT.encode())),
    ],
)
def test_a_field_that_is_not_what_it_must_be_is_named(authority, field: str, value) -> None:
    with pytest.raises(EnrolmentError, match=rf"cannot be used: {field}: .*nothing was kept") as e:
        checked_reply(answer(authority, **{field: value}), site="north", key=KEY.public_key())
    assert str(e.value).isprintable()


def test_certificates_must_be_of_this_site_and_of_that_authority(
    authority: Pki, tmp_path: Path
) -> None:
    other = Pki.create(tmp_path / "other", ["localhost"])
    stranger = ec.generate_private_key(ec.SECP256R1())
    ours = authority.ca_path.read_bytes()
    wrong = {
        "not of the key": {"certificate_pem": certificate(authority, key=stranger)},
        "one of north by that authority": {"certificate_pem": certificate(other)},
        "expected one of north": {"certificate_pem": certificate(authority, "south")},
        "an authority, signed by itself": {"ca_pem": certificate(authority)},
        "expected one certificate": {"ca_pem": ours + other.ca_path.read_bytes()},
    }
    for why, change in wrong.items():
        with pytest.raises(EnrolmentError, match=why):
            checked_reply(answer(authority, **change), site="north", key=KEY.public_key())
    leaf = authority.folder / "server.crt"
    with pytest.raises(EnrolmentError, match="signed by itself"):
        checked_reply(
            answer(authority, ca_pem=leaf.read_bytes()), site="north", key=KEY.public_key()
        )
