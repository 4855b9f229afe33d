"""A SuperLink that listens, and nodes that talk to it."""

import ssl
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supernode.fleet_http_connection import http_request_response

from crafts_server.pki import Pki
from crafts_server.superlink import SuperLink


@pytest.fixture
def link(tmp_path: Path) -> Iterator[tuple[SuperLink, ssl.SSLContext]]:
    with listening(tmp_path) as link:
        yield link


@contextmanager
def listening(folder: Path) -> Iterator[tuple[SuperLink, ssl.SSLContext]]:
    """It, and what a client needs to trust it."""
    pki = Pki.create(folder / "pki", ["localhost"])
    link = SuperLink(database=folder / "link.db", pki=pki, host="127.0.0.1", port=0)
    link.start()
    yield link, ssl.create_default_context(cafile=str(pki.ca_path))
    link.stop()


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def openssh(key: ec.EllipticCurvePrivateKey) -> str:
    """The public key as a site sends it."""
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def admitted_key(server: SuperLink, site: str) -> ec.EllipticCurvePrivateKey:
    """The key of a node that may connect."""
    key = new_key()
    server.admit(site, openssh(key))
    return key


def admitted_nodes(server: SuperLink) -> set[str]:
    return {node.name for node in server.state.get_node_info(statuses=["registered"])}


def signed_by(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """The headers that a SuperNode sends."""
    timestamp = now().isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, timestamp.encode())).decode(),
        TIMESTAMP_HEADER: timestamp,
    }


@contextmanager
def connected(server: SuperLink) -> Iterator[tuple]:
    """The connection that a stock SuperNode keeps, by Flower's own code: a node and its calls."""
    key = admitted_key(server, "north")
    authority = Path(server._server.config.ssl_certfile).with_name("ca.crt").read_bytes()
    address, keys = f"localhost:{server.port}", (key, key.public_key())
    connection = http_request_response(address, False, authority, keys)
    try:
        yield connection.__enter__()
    finally:
        connection.__exit__(None, None, None)  # by itself it would swallow what a test raises
