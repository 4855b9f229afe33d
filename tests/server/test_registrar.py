"""Enrolment and registrar over TLS on loopback: a site's whole way in, strangers outside."""

import hashlib
import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID
from sqlalchemy import delete
from typer.testing import CliRunner

from crafts_client import doctor, ledger_witness
from crafts_client.agreed_patients import check_agreed, fetch_roster
from crafts_client.cli import app as client_app
from crafts_client.enrolment import (
    Registrar,
    certificate_of,
    coordinator_record,
    end_if_revoked,
    enrol,
    forget_coordinator,
)
from crafts_client.errors import EnrolmentError, LeftError, NotAgreedError
from crafts_client.home import SITE_NAME, SiteHome
from crafts_client.home_backup import ask_witnesses, back_up, put_back
from crafts_client.ledger_witness import witness_at_start, witness_ledger
from crafts_client.peer_heads import PeerHeads
from crafts_client.refusals import refusal_of
from crafts_client.site_key import signed_head, site_key
from crafts_client.site_ledger import existing_ledger, take_place
from crafts_core.errors import CraftsError
from crafts_core.foundation_manifest import verify
from crafts_core.plan import Plan
from crafts_core.registrar import REGISTRAR, calls_of, messages
from crafts_core.roster import Roster, RosterError, identity_words
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.errors import LedgerTamperedError
from crafts_privacy.ledger import Ledger, Lifetime, PlanLimit
from crafts_privacy.signing import public_key_of, sign
from crafts_server import pki
from crafts_server import registrar as registrar_module
from crafts_server.audit_log import Event
from crafts_server.cli import app as server_app
from crafts_server.enrolments import Enrolments, Witness
from crafts_server.errors import HomeError, PkiError
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.pki import Pki, fingerprint
from crafts_server.registrar import (
    EnrolmentService,
    RegistrarService,
    enrolment_server,
    registrar_server,
)
from crafts_server.registry import RunStatus
from crafts_server.registry_rows import CohortSizeRow, WitnessRow
from crafts_server.signed_heads import SignedHeads
from crafts_server.status import status_of
from support.disk import fill_disk
from support.hostile import TEXT, assert_harmless
from support.proxy import FAR, Proxy
from support.sites import make_site_home, plan_values
from support.summing_sites import summed_plan

pytestmark = [pytest.mark.network, pytest.mark.slow]
PATIENTS = 7
"""What the site declares; it has six."""


@dataclass
class Coordinator:
    home: CoordinatorHome
    pki: Pki
    enrolments: Enrolments
    enrolment_port: int
    registrar_port: int
    joined: list[tuple[str, str]]

    @property
    def host(self) -> str:
        return f"localhost:{self.enrolment_port}"

    def invite(self, name: str, **options) -> str:
        values = {"valid_for": timedelta(hours=1), "patients": PATIENTS} | options
        token = self.enrolments.invite(name, **values)
        shown = x509.load_pem_x509_certificate(self.pki.pair("enrolment")[1])
        return f"{token}.{fingerprint(shown)}"


@pytest.fixture
def coordinator(tmp_path: Path, foundation) -> Iterator[Coordinator]:
    config = HomeConfig(foundation=str(foundation.path))
    home = CoordinatorHome.create(tmp_path / "coordinator", config)
    pki = Pki.create(home.path / "pki", ["localhost", "127.0.0.1", FAR])
    registry = home.registry()
    enrolments, joined = Enrolments(registry), []
    service = RegistrarService(home, enrolments, SignedHeads(registry))
    registrar, registrar_port = registrar_server(service, pki, "127.0.0.1:0")
    enrolment, enrolment_port = enrolment_server(
        EnrolmentService(
            enrolments,
            pki,
            signer=home.public_key,
            registrar_address=f"localhost:{registrar_port}",
            fleet_address="localhost:1",
            on_enrolled=lambda *who: joined.append(who),
        ),
        pki,
        "127.0.0.1:0",
    )
    yield Coordinator(home, pki, enrolments, enrolment_port, registrar_port, joined)
    registrar.stop(None).wait()
    enrolment.stop(None).wait()
    registry.close()


@pytest.fixture
def site(tmp_path: Path, foundation) -> SiteHome:
    home = make_site_home(tmp_path / "north", foundation, "unknown", answer_every_s="auto")
    return declaring(home, PATIENTS)


def declaring(site: SiteHome, patients: int) -> SiteHome:
    """The operator has written another number into site.toml."""
    path = site.path / SITE_NAME
    now = f"declared_patients = {site.config.declared_patients}\n"
    path.write_text(path.read_text().replace(now, f"declared_patients = {patients}\n"))
    return SiteHome.open(site.path)


def test_an_invited_site_enrols_and_reads_plans(coordinator, site, foundation) -> None:
    signed = coordinator.home.sign_plan(Plan.parse(plan_values(foundation.manifest.hash)))
    record = enrol(site, coordinator.host, coordinator.invite("north"))

    assert record.signer == coordinator.home.public_key
    assert record.ca_fingerprint == fingerprint(coordinator.pki.ca)
    assert [name for name, _ in coordinator.joined] == ["north"]
    assert coordinator.joined[0][1].startswith("ecdsa-sha2-nistp256 ")
    with Registrar(site) as registrar:
        (plan,) = registrar.call("ListPlans").plans
        assert not plan.has_finished
        with coordinator.home.registry() as registry:
            registry.start_run("run-1", Plan.parse(json.loads(plan.json)).hash)
            registry.set_status("run-1", RunStatus.FINISHED)
        assert registrar.call("ListPlans").plans[0].has_finished
    assert (plan.json, plan.signature) == (signed.json, signed.signature)
    keys = site.path / "keys"
    assert {p.stat().st_mode & 0o777 for p in keys.glob("*.key")} == {0o600}


def test_what_a_hostile_coordinator_answers_is_harmless_and_not_kept(
    coordinator, site, monkeypatch
) -> None:
    """A whole line of its own, in a refusal and in a field of a yes."""
    hostile = TEXT.replace("\ud800", "")
    told = ["enroll", coordinator.host, "--home", str(site.path), "--token"]

    def refuse(*_: object) -> None:
        raise registrar_module.RefusedError(grpc.StatusCode.PERMISSION_DENIED, hostile)

    with monkeypatch.context() as patched:
        patched.setattr(registrar_module, "check_node_key", refuse)
        refused = CliRunner().invoke(client_app, [*told, coordinator.invite("north")])
    assert refused.exit_code == 1
    assert_harmless(refused.stderr, num_lines=1)
    reply = messages.EnrolReply
    monkeypatch.setattr(
        registrar_module.messages, "EnrolReply", lambda **v: reply(**v | {"signer": hostile})
    )
    answered = CliRunner().invoke(client_app, [*told, coordinator.invite("north")])
    assert (answered.exit_code, "signer: " in answered.stderr) == (1, True)
    assert answered.stderr.removesuffix("\n").isprintable()
    assert not site.coordinator_path.exists()
    assert list((site.path / "keys").glob("*")) == [site.site_key_path], "its own, made before"


def test_a_revoked_sites_join_says_so_and_ends(coordinator, site, monkeypatch) -> None:
    """Not as a failure that a service manager would start it again for."""
    enrol(site, coordinator.host, coordinator.invite("north"))
    coordinator.enrolments.revoke("north")
    taking_part: list[object] = []
    monkeypatch.setattr("crafts_client.supernode.join", lambda *_: taking_part.append(1))
    ended = CliRunner().invoke(client_app, ["join", "--home", str(site.path)])
    assert (ended.exit_code, taking_part) == (3, [])
    assert "this certificate is revoked or replaced" in ended.stderr
    assert "ask for a new invitation" in ended.stderr


def test_a_coordinator_that_is_away_has_revoked_nobody(coordinator, site) -> None:
    enrol(site, coordinator.host, coordinator.invite("north"))
    end_if_revoked(site, certificate_of(site))
    record = coordinator_record(site).model_copy(update={"registrar_address": "localhost:1"})
    site.coordinator_path.write_text(record.model_dump_json())
    end_if_revoked(site, certificate_of(site))


def test_what_takes_part_ends_once_the_site_has_left_or_enrolled_anew(coordinator, site) -> None:
    """Its keys are gone or others, so nobody could say that they are revoked."""
    enrol(site, coordinator.host, coordinator.invite("north"))
    certificate = certificate_of(site)
    forget_coordinator(site)
    with pytest.raises(LeftError, match="has left its coordinator"):
        end_if_revoked(site, certificate)
    enrol(site, coordinator.host, coordinator.invite("north"))
    with pytest.raises(LeftError, match="enrolled anew; start crafts-client join again"):
        end_if_revoked(site, certificate)
    end_if_revoked(site, certificate_of(site))


def test_an_absurd_offset_is_the_askers_error(coordinator, site, caplog) -> None:
    enrol(site, coordinator.host, coordinator.invite("north"))
    path = next(iter(verify(coordinator.home.foundation_path).files))
    with Registrar(site) as registrar:
        with pytest.raises(EnrolmentError, match="no file is that long"):
            registrar.call("ReadFoundation", path=path, offset=2**64 - 1)
        assert registrar.call("ReadFoundation", path=path, offset=2**30).data == b""
    assert not any(record.exc_info for record in caplog.records)


def enrolling(coordinator: Coordinator) -> EnrolmentService:
    """Another one of the same coordinator."""
    return EnrolmentService(
        coordinator.enrolments,
        coordinator.pki,
        signer=coordinator.home.public_key,
        registrar_address="localhost:1",
        fleet_address="localhost:1",
        on_enrolled=lambda *_: None,
    )


def test_who_is_refused_is_logged_with_an_address_and_counted(
    tmp_path, coordinator, site, caplog
) -> None:
    refused: list[str] = []
    service = enrolling(coordinator)
    server, port = enrolment_server(
        service, coordinator.pki, "127.0.0.1:0", on_refused=refused.append
    )
    token = coordinator.invite("north").partition(".")[2]
    with pytest.raises(EnrolmentError, match="unknown, used or expired"):
        enrol(site, f"localhost:{port}", f"nosuchtoken.{token}")
    server.stop(None).wait()
    assert refused == ["Enrol"]
    (line,) = [record.getMessage() for record in caplog.records if "refused" in record.msg]
    assert re.fullmatch(r"refused call=Enrol status=PERMISSION_DENIED peer=ipv\S+:\d+", line), line


def has_ended(connection: socket.socket) -> bool:
    """Within the socket's time."""
    with connection, suppress(TimeoutError):
        while connection.recv(4096):
            pass
        return True
    return False


def test_connections_that_ask_nothing_end(coordinator, monkeypatch) -> None:
    """Before and after the handshake; any number of them could be held open before."""
    monkeypatch.setattr(registrar_module, "HANDSHAKE_MS", 200)
    monkeypatch.setattr(registrar_module, "IDLE_MS", 200)
    service = enrolling(coordinator)
    server, port = enrolment_server(service, coordinator.pki, "127.0.0.1:0")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    silent = socket.create_connection(("127.0.0.1", port), timeout=60)
    idle = context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=60))
    idle.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    idle.recv(4096)  # the server's settings, which a client accepts
    idle.sendall(bytes([0, 0, 0, 4, 1, 0, 0, 0, 0]))
    assert [has_ended(each) for each in (silent, idle)] == [True, True]
    server.stop(None).wait()


def test_private_keys_stay_where_they_were_made(coordinator, site) -> None:
    """Everything that reached the coordinator's disk, searched for the site's keys."""
    enrol(site, coordinator.host, coordinator.invite("north"))
    for path in (site.path / "keys").glob("*.key"):
        secret = path.read_bytes().splitlines()[1]
        for file in coordinator.home.path.rglob("*"):
            assert not (file.is_file() and secret in file.read_bytes()), file


def test_a_site_with_another_number_of_patients_is_not_let_in(coordinator, site) -> None:
    """A typo in site.toml; its token still counts once it is mended."""
    token = coordinator.invite("north")
    with pytest.raises(EnrolmentError, match=r"is for 7 patients, site\.toml declares 4000"):
        enrol(declaring(site, 4000), coordinator.host, token)
    assert coordinator.joined == []
    enrol(declaring(SiteHome.open(site.path), PATIENTS), coordinator.host, token)
    assert coordinator.enrolments.sizes.agreed() == {"north": PATIENTS}


def test_a_change_of_patients_needs_both_sides(coordinator, site) -> None:
    """Until then the site answers no round: its update would be refused, and be paid for."""
    enrol(site, coordinator.host, coordinator.invite("north"))
    check_agreed(site)
    changed = declaring(site, 60)
    with pytest.raises(NotAgreedError, match=r"site\.toml declares 60 patients, agreed are 7"):
        check_agreed(changed)
    server, client = CliRunner(), CliRunner()
    home, where = ["--home", str(coordinator.home.path)], ["--home", str(site.path)]
    alone = server.invoke(server_app, ["sites", "resize", "north", "60", *home])
    assert (alone.exit_code, "declares 7 patients, not 60" in alone.stderr) == (1, True)
    told = client.invoke(client_app, ["declare", *where])
    assert "agreed are 7; ask the coordinator for: crafts-server sites resize north 60" in (
        told.stdout
    )
    listed = server.invoke(server_app, ["sites", "list", *home]).stdout
    assert "7 patients (declares 60: sites resize north 60)" in listed
    with pytest.raises(NotAgreedError):
        check_agreed(changed)
    agreed = server.invoke(server_app, ["sites", "resize", "north", "60", *home])
    assert agreed.exit_code == 0, agreed.stderr
    check_agreed(changed)
    with pytest.raises(NotAgreedError, match="declares 7 patients, agreed are 60"):
        check_agreed(site)
    (entry,) = [e for e in coordinator.home.audit_log.verify() if e.event == Event.RESIZED]
    assert entry.facts == {"site": "north", "patients": 60, "before": 7}


def test_join_answers_no_round_while_the_number_is_not_agreed(
    coordinator, site, monkeypatch
) -> None:
    """Before a round and again before its release: what ``join`` asks each time."""
    enrol(site, coordinator.host, coordinator.invite("north"))
    asked: list[Callable[[], None]] = []

    def make(_open_site: object, *, witness: Callable[[], None]) -> None:
        asked.append(witness)

    monkeypatch.setattr("crafts_client.client_app.make_client_app", make)
    monkeypatch.setattr("crafts_client.supernode.join", lambda *_: None)
    for patients in (PATIENTS, 4000):
        declaring(SiteHome.open(site.path), patients)
        joined = CliRunner().invoke(client_app, ["join", "--home", str(site.path)])
        assert joined.exit_code == 0, joined.stderr
    agreed, mistyped = asked
    agreed()
    with pytest.raises(NotAgreedError, match="agreed are 7"):
        mistyped()


def test_a_site_that_was_enrolled_before_sizes_were_agreed_is_told_so(coordinator, site) -> None:
    enrol(site, coordinator.host, coordinator.invite("north"))
    with coordinator.home.registry().session() as session:
        session.delete(session.get(CohortSizeRow, "north"))
    with pytest.raises(NotAgreedError, match="agreed are none; run crafts-client declare"):
        check_agreed(site)
    assert refusal_of(NotAgreedError()).code == 118


def test_everybody_sees_the_roster_that_the_coordinator_signed(
    coordinator, site, foundation
) -> None:
    plan = Plan.parse(plan_values(foundation.manifest.hash))
    coordinator.home.sign_plan(plan)
    enrol(site, coordinator.host, coordinator.invite("north"))
    coordinator.enrolments.sizes.agree("south", 28)
    roster = fetch_roster(site, plan.hash)
    assert roster.patients == {"north": 7, "south": 28}
    shown = CliRunner().invoke(
        client_app, ["plan", "roster", plan.hash[:16], "--home", str(site.path)]
    )
    assert [line.split()[:2] for line in shown.stdout.splitlines()[:2]] == [
        ["north", "7"],
        ["south", "28"],
    ]
    assert "20.0%" in shown.stdout
    assert roster.hash in shown.stdout
    with pytest.raises(EnrolmentError, match="no such plan was signed"):
        fetch_roster(site, "0" * 64)


def test_a_plan_of_sums_has_a_roster_of_keys_that_stays(coordinator, site) -> None:
    plan = summed_plan()
    enrol(site, coordinator.host, coordinator.invite("north"))
    keys = {name: Ed25519PrivateKey.generate() for name in ("north", "south", "west")}
    own = public_key_of(site_key(site, existing_ledger(site)))
    for name in ("south", "west"):
        coordinator.enrolments.sizes.agree(name, 28)
        coordinator.enrolments.rosters.publish(name, public_key_of(keys[name]))
    coordinator.home.sign_plan(plan)
    with Registrar(site) as registrar:
        with pytest.raises(EnrolmentError, match="another site signs"):
            registrar.call("PublishIdentity", **shown(keys["south"], "north"))
        registrar.call("PublishIdentity", **shown(keys["north"], "north"))
        reply = registrar.call("GetRoster", plan_hash=plan.hash)
    roster = Roster.parse(reply.json)
    of_others = {name: public_key_of(keys[name]) for name in ("south", "west")}
    assert roster.identities == {"north": own} | of_others
    assert reply.signature == coordinator.home.sign_roster(roster)
    renewed = coordinator.enrolments.rosters.renew(plan)
    assert renewed.identities["north"] == public_key_of(keys["north"])


def shown(key: Ed25519PrivateKey, site: str) -> dict[str, str]:
    """A key, and that it signs for a site."""
    return {
        "identity_public_key": public_key_of(key),
        "identity_signature": sign(key, identity_words(site)),
    }


def test_nobody_publishes_a_key_that_is_not_theirs(coordinator, site) -> None:
    """Public keys are in every roster; its owner could not have enrolled any more."""
    enrol(site, coordinator.host, coordinator.invite("north"))
    victim = Ed25519PrivateKey.generate()
    of_another = shown(victim, "south")
    with Registrar(site) as registrar:
        for signature in ("", of_another["identity_signature"], sign(victim, b"north")):
            claim = of_another | {"identity_signature": signature}
            with pytest.raises(EnrolmentError, match="has not signed this site's name"):
                registrar.call("PublishIdentity", **claim)


def test_a_site_with_another_sites_key_is_not_let_in(coordinator, site) -> None:
    """A home that was copied; its token still counts for a home of its own."""
    own = public_key_of(site_key(site, existing_ledger(site)))
    coordinator.enrolments.rosters.publish("south", own)
    token = coordinator.invite("north")
    with pytest.raises(EnrolmentError, match="copy of its home, make a new one"):
        enrol(site, coordinator.host, token)
    assert coordinator.joined == []
    coordinator.enrolments.rosters.publish("south", b64encode(bytes([3]) * 32).decode())
    enrol(SiteHome.open(site.path), coordinator.host, token)


def test_a_site_that_leaves_may_come_back_under_another_name(coordinator, site) -> None:
    """With its home, and so with its salt and ledger: it was told to make a new one."""
    own = public_key_of(site_key(site, existing_ledger(site)))
    enrol(site, coordinator.host, coordinator.invite("north"))
    with Registrar(site) as registrar:
        registrar.call("Leave")
    text = (site.path / "site.toml").read_text()
    (site.path / "site.toml").write_text(text.replace('name = "north"', 'name = "north-clinic"'))
    renamed = SiteHome.open(site.path)
    assert renamed.config.name == "north-clinic"
    assert (
        enrol(renamed, coordinator.host, coordinator.invite("north-clinic")).site == "north-clinic"
    )
    assert public_key_of(site_key(renamed, existing_ledger(renamed))) == own
    with Registrar(renamed) as registrar:
        registrar.call("ListPlans")


def test_a_call_is_a_contact_and_enrolment_is_none(coordinator, site) -> None:
    enrol(site, coordinator.host, coordinator.invite("north"))
    (before,) = status_of(coordinator.home).sites
    with Registrar(site) as registrar:
        registrar.call("ListPlans")
    (after,) = status_of(coordinator.home).sites
    assert before.last_contact is None
    assert after.last_contact is not None


def test_a_plan_of_sums_that_was_refused_is_not_offered(coordinator, site) -> None:
    enrol(site, coordinator.host, coordinator.invite("north"))
    with pytest.raises(HomeError, match="needs 3 sites, 1 are enrolled"):
        coordinator.home.sign_plan(summed_plan())
    with Registrar(site) as registrar:
        assert list(registrar.call("ListPlans").plans) == []


def test_a_plan_of_sums_is_not_signed_before_every_site_has_said_its_key(coordinator) -> None:
    for name in ("north", "south", "west"):
        coordinator.enrolments.sizes.agree(name, 28)
    with pytest.raises(RosterError, match="no identity key of north, south, west"):
        coordinator.home.sign_plan(summed_plan())


@pytest.mark.parametrize("spoil", ["number", "key", "plan"])
def test_a_roster_that_the_signer_did_not_sign_so_is_not_shown(
    coordinator, site, foundation, tmp_path: Path, monkeypatch, spoil: str
) -> None:
    plan = Plan.parse(plan_values(foundation.manifest.hash))
    coordinator.home.sign_plan(plan)
    enrol(site, coordinator.host, coordinator.invite("north"))
    true = Roster.of(plan.hash, {"north": 7})
    signature = coordinator.home.sign_roster(true)
    sent = {"number": Roster.of(plan.hash, {"north": 9}), "plan": Roster.of("0" * 64, {})}.get(
        spoil, true
    )
    if spoil == "key":
        other = CoordinatorHome.create(tmp_path / "other", HomeConfig())
        signature = other.sign_roster(true)
    elif spoil == "plan":
        signature = coordinator.home.sign_roster(sent)
    reply = messages.GetRosterReply(json=sent.to_json(), signature=signature)
    monkeypatch.setattr(Registrar, "call", lambda *_args, **_fields: reply)
    with pytest.raises(CraftsError):
        fetch_roster(site, plan.hash)


@pytest.mark.parametrize("spoil", ["used", "expired", "revoked", "unknown", "newer"])
def test_a_token_that_does_not_count_enrols_nobody(coordinator, site, spoil: str) -> None:
    token = coordinator.invite(
        "north", **({"valid_for": -timedelta(1)} if spoil == "expired" else {})
    )
    if spoil == "used":
        enrol(site, coordinator.host, token)
    elif spoil == "revoked":
        coordinator.enrolments.revoke("north")
    elif spoil == "unknown":
        token = "A" + token
    elif spoil == "newer":
        coordinator.invite("north")
    before = [each.name for each in coordinator.enrolments.sites()]
    with pytest.raises(EnrolmentError, match="unknown, used or expired; ask for a new invitation"):
        enrol(site, coordinator.host, token)
    assert [each.name for each in coordinator.enrolments.sites()] == before


def test_a_token_for_another_site_stays_unused(coordinator, site) -> None:
    token = coordinator.invite("south")
    with pytest.raises(EnrolmentError, match="the invitation is for south"):
        enrol(site, coordinator.host, token)
    assert coordinator.enrolments.waiting().keys() == {"south"}


def test_another_certificate_than_the_invitations_is_not_trusted(coordinator, site) -> None:
    """As TLS inspection on the way, or a wrong host, would show."""
    secret, _, shown = coordinator.invite("north").partition(".")
    other = f"{secret}.{'0' * 64}"
    with pytest.raises(EnrolmentError, match="TLS inspection"):
        enrol(site, coordinator.host, other)
    assert coordinator.enrolments.waiting(), "the secret was not sent"
    with pytest.raises(EnrolmentError, match="no whole token"):
        enrol(site, coordinator.host, secret)
    with pytest.raises(EnrolmentError, match="cannot reach localhost:1 "):
        enrol(site, "localhost:1", f"{secret}.{shown}")


def test_a_revoked_or_replaced_certificate_is_refused(coordinator, site) -> None:
    enrol(site, coordinator.host, coordinator.invite("north"))
    with Registrar(site) as registrar:
        assert list(registrar.call("ListPlans").plans) == []
        coordinator.enrolments.revoke("north")
        with pytest.raises(EnrolmentError, match="revoked or replaced"):
            registrar.call("ListPlans")
    files = [site.path / "keys" / name for name in ("tls.crt", "tls.key", "node.key")]
    old = [file.read_bytes() for file in files]
    enrol(site, coordinator.host, coordinator.invite("north"))
    with Registrar(site) as registrar:
        registrar.call("ListPlans")
    for file, content in zip(files, old, strict=True):
        assert file.read_bytes() != content, "a new enrolment has new keys"
        file.write_bytes(content)
    with Registrar(site) as registrar, pytest.raises(EnrolmentError, match="revoked or replaced"):
        registrar.call("ListPlans")


def test_who_shows_no_certificate_of_ours_gets_no_answer(coordinator) -> None:
    call = calls_of(REGISTRAR)["ListPlans"]
    credentials = grpc.ssl_channel_credentials(coordinator.pki.ca_path.read_bytes())
    with grpc.secure_channel(f"localhost:{coordinator.registrar_port}", credentials) as channel:
        stub = channel.unary_unary(call.path, response_deserializer=call.reply.FromString)
        with pytest.raises(grpc.RpcError) as caught:
            stub(b"", timeout=5)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_the_foundation_is_read_in_pieces_and_nothing_else_is(
    coordinator, site, foundation
) -> None:
    enrol(site, coordinator.host, coordinator.invite("north"))
    name = max(foundation.manifest.files, key=lambda n: (foundation.path / n).stat().st_size)
    with Registrar(site) as registrar:
        manifest = registrar.call("GetFoundation").manifest
        assert manifest == (foundation.path / "foundation.json").read_bytes()
        whole, offset = b"", 0
        while piece := registrar.call("ReadFoundation", path=name, offset=offset).data:
            whole, offset = whole + piece, offset + len(piece)
        assert whole == (foundation.path / name).read_bytes()
        for path in ("../coordinator/signing.key", "/etc/hostname", "foundation.json", ""):
            with pytest.raises(EnrolmentError, match="no such file"):
                registrar.call("ReadFoundation", path=path, offset=0)


def test_a_ledger_put_back_from_a_copy_is_found(coordinator, site) -> None:
    enrol(site, coordinator.host, coordinator.invite("north"))
    heads = {number: f"{number:064x}" for number in range(1, 6)}
    with Registrar(site) as registrar:

        def say(entries: int, at_kept: str = "") -> object:
            return registrar.call(
                "WitnessLedger",
                ledger="l",
                entries=entries,
                head=heads[entries],
                hash_at_witnessed=at_kept,
            )

        assert say(2) == messages.WitnessLedgerReply()
        assert say(5, heads[2]) == messages.WitnessLedgerReply(entries=2, head=heads[2])
        with pytest.raises(EnrolmentError, match="5 entries long when it was last witnessed"):
            say(3, heads[3])  # the copy of round three
        with pytest.raises(EnrolmentError, match="is another now"):
            say(5, heads[4])  # as long, with another history


def spend(site: SiteHome, *, round: int) -> None:
    event = PrivacyEvent(noise_multiplier=5.0, sample_rate=0.1, steps=1)
    ledger = Ledger(site.ledger_path)
    reservation = ledger.reserve(
        cohort="main",
        plan_hash="0" * 64,
        run_id="r",
        round=round,
        stage="s",
        event=event,
        request_hash="0" * 64,
        lifetime=Lifetime(max_epsilon=9.0, delta=1e-3, filters=("sums",)),
        plan_limit=PlanLimit(max_epsilon=9.0, delta=1e-3),
    )
    ledger.commit(reservation, "0" * 64)


def test_a_ledger_is_witnessed_once_the_coordinators_disk_has_room(
    coordinator, site, monkeypatch
) -> None:
    enrol(site, coordinator.host, coordinator.invite("north"))
    spend(site, round=1)
    monkeypatch.setattr(ledger_witness, "_WAITS_S", (0.05,) * 100)
    timer = fill_disk(for_s=0.5)
    witness_ledger(site)
    timer.join()
    name = hashlib.sha256(b"main").hexdigest()[:32]
    kept = coordinator.enrolments.witness("north", name, Witness(entries=0, head=""), "")
    assert kept.entries == 2


def test_a_site_finds_its_ledger_put_back_together_with_its_local_witness(
    coordinator, site
) -> None:
    enrol(site, coordinator.host, coordinator.invite("north"))
    files = [site.ledger_path, site.ledger_path.with_name(site.ledger_path.name + ".head")]
    witness_ledger(site)
    spend(site, round=1)
    witness_ledger(site)
    witness_ledger(site)
    copies = [path.read_bytes() for path in files]
    spend(site, round=2)
    witness_ledger(site)
    for path, copy in zip(files, copies, strict=True):
        path.write_bytes(copy)
    Ledger(site.ledger_path).verify()  # by itself it cannot know
    with pytest.raises(LedgerTamperedError, match=r"with 4 entries, and this one \(2 entries\)"):
        witness_ledger(site)
    spend(site, round=7)  # as long as the real one, and another
    with pytest.raises(LedgerTamperedError, match="does not continue it"):
        witness_ledger(site)
    for path in files:
        path.unlink()
    with pytest.raises(LedgerTamperedError, match=r"this one \(0 entries\)"):
        witness_ledger(site)


@pytest.fixture
def south(coordinator, site, tmp_path: Path, foundation) -> SiteHome:
    """Another site; both are enrolled."""
    other = make_site_home(
        tmp_path / "south", foundation, "unknown", name="south", declared_patients=PATIENTS
    )
    enrol(site, coordinator.host, coordinator.invite("north"))
    enrol(other, coordinator.host, coordinator.invite("south"))
    return other


def forget_what_was_witnessed(coordinator: Coordinator) -> None:
    """A coordinator that says nothing of what it saw; heads of others it still hands on."""
    with coordinator.home.registry().session() as session:
        session.execute(delete(WitnessRow))


def witnessed_copy(coordinator: Coordinator, site: SiteHome, south: SiteHome) -> SiteHome:
    """A copy, after one round, of a site whose second round is known to another site.

    Its operator has said that there is no other copy.
    """
    take_place(site, Ledger(site.ledger_path))
    spend(site, round=1)
    copy = SiteHome.open(Path(shutil.copytree(site.path, site.path.with_name("copy"))))
    Ledger(copy.ledger_path).move()
    spend(site, round=2)
    witness_ledger(site)
    witness_ledger(south)  # gets north's head
    witness_ledger(south)  # and says that it holds it
    forget_what_was_witnessed(coordinator)
    return copy


def test_the_other_sites_are_witnesses_where_the_coordinator_is_none(
    coordinator, site, south
) -> None:
    copy = witnessed_copy(coordinator, site, south)
    assert [head.site for head in PeerHeads(south.peer_heads_path).held()] == ["north"]
    with pytest.raises(LedgerTamperedError, match="another site holds a head of 5 entries"):
        witness_ledger(copy)
    forget_what_was_witnessed(coordinator)
    spend(copy, round=7)
    with pytest.raises(LedgerTamperedError, match="another copy went on"):
        witness_at_start(copy)
    forget_what_was_witnessed(coordinator)
    spend(site, round=3)
    witness_ledger(site)


def test_a_backup_that_nobody_vouched_for_can_be_put_back_again(
    coordinator, site, south, caplog, tmp_path: Path
) -> None:
    """Each time the ledger says so in another entry; nobody hears of one that may not stay."""
    take_place(site, Ledger(site.ledger_path))
    spend(site, round=1)
    witness_ledger(site)
    back_up(site, tmp_path / "b.tar", keys=True, tiles=False)
    for name in ("first", "second"):
        put_back(tmp_path / "b.tar", tmp_path / name, newest_ledger=None)
        home = SiteHome.open(tmp_path / name)
        ask_witnesses(home, Ledger(home.ledger_path))
        witness_ledger(south)
    Ledger(home.ledger_path).move()
    witness_ledger(home)
    witness_ledger(south)
    assert "alarm" not in caplog.text


def test_a_coordinator_that_keeps_heads_back_is_not_seen_from_inside(
    coordinator, site, south, monkeypatch
) -> None:
    """What docs/privacy.md says that it can do; a folder of the hospital's own sees it."""
    copy = witnessed_copy(coordinator, site, south)
    monkeypatch.setattr(SignedHeads, "exchange", lambda *_: ([], []))
    witness_ledger(copy)


def test_two_ledgers_of_one_site_raise_an_alarm_at_the_others(
    coordinator, site, south, caplog
) -> None:
    witnessed_copy(coordinator, site, south)
    other = SiteHome.open(site.path)
    for path in (other.ledger_path, other.ledger_path.with_name("ledger.db.head")):
        path.unlink()
    spend(other, round=1)
    with pytest.raises(LedgerTamperedError, match="another site holds a head"):
        witness_ledger(other)
    witness_ledger(south)
    assert "alarm: two ledgers of site=north" in caplog.text
    found = {each.found for each in doctor.witnesses(south)}
    assert any("north showed two ledgers: north: 5 entries" in each for each in found)


def test_a_head_is_accepted_from_its_own_site_only(coordinator, site, south) -> None:
    spend(site, round=1)
    norths = signed_head(site, Ledger(site.ledger_path))
    forged = norths.model_copy(update={"site": "south"})
    with Registrar(south) as registrar:
        for head, says in (
            (norths, "shows its own head once"),
            (forged, "not signed by its key"),
            (norths.model_copy(update={"hash": "x"}), "no signed head"),
        ):
            with pytest.raises(EnrolmentError, match=says):
                registrar.call("ExchangeHeads", mine=messages.SignedHead(**head.model_dump()))


def test_heads_of_one_coordinators_sites_are_not_shown_to_another(coordinator, site, south) -> None:
    witness_ledger(south)
    witness_ledger(site)
    assert [head.site for head in PeerHeads(site.peer_heads_path).held()] == ["south"]
    enrol(site, coordinator.host, coordinator.invite("north"))
    assert site.peer_heads_path.exists(), "the same coordinator"
    record = json.loads(site.coordinator_path.read_text())
    site.coordinator_path.write_text(json.dumps(record | {"ca_fingerprint": "0" * 64}))
    enrol(site, coordinator.host, coordinator.invite("north"))
    assert not site.peer_heads_path.exists()
    witness_ledger(site)
    forget_coordinator(site)
    assert not site.peer_heads_path.exists()


def test_a_site_starts_while_its_coordinator_is_away(site, caplog) -> None:
    witness_at_start(site)
    assert "nobody has witnessed the ledger yet" in caplog.text


def test_a_site_that_leaves_is_revoked_and_keeps_what_it_owns(coordinator, site) -> None:
    enrol(site, coordinator.host, coordinator.invite("north"))
    left = CliRunner().invoke(client_app, ["leave", "--yes", "--home", str(site.path)])
    assert left.exit_code == 0, left.output
    assert [each.revoked_at is None for each in coordinator.enrolments.sites()] == [False]
    assert not site.coordinator_path.exists()
    assert list((site.path / "keys").iterdir()) == [site.site_key_path]
    assert site.tile_store_path.exists()
    again = CliRunner().invoke(client_app, ["leave", "--yes", "--home", str(site.path)])
    assert again.exit_code == 1
    assert "this site is not enrolled" in again.output


@pytest.fixture
def behind(coordinator, site) -> Callable[[str], None]:
    """Enrols, and makes the record lead to an address that is not loopback."""

    def enrolled(address: str) -> None:
        enrol(site, address, coordinator.invite("north"))
        record = json.loads(site.coordinator_path.read_text())
        record["registrar_address"] = f"{FAR}:{coordinator.registrar_port}"
        record["fleet_address"] = f"{FAR}:{coordinator.registrar_port}"
        site.coordinator_path.write_text(json.dumps(record))

    return enrolled


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "all_proxy"])
def test_a_site_behind_a_proxy_enrols_and_asks(
    coordinator, site, behind, monkeypatch, variable: str
) -> None:
    """With a password and without a scheme; gRPC's own variables lead nowhere."""
    with Proxy(wants="Basic dXM6cHc=") as proxy:
        monkeypatch.setenv(variable, f"us:pw@{proxy.address}")
        monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("no_grpc_proxy", FAR)
        monkeypatch.setenv("no_proxy", "ample.org")  # what gRPC would take for its end
        behind(f"{FAR}:{coordinator.enrolment_port}")
        with Registrar(site) as registrar:
            registrar.call("ListPlans")
    ports = {coordinator.enrolment_port, coordinator.registrar_port}
    assert set(proxy.asked) == {f"{FAR}:{port}" for port in ports}


def test_a_coordinator_on_loopback_is_asked_directly(coordinator, site, monkeypatch) -> None:
    with Proxy() as proxy:
        for variable in ("HTTPS_PROXY", "https_proxy", "http_proxy", "grpc_proxy"):
            monkeypatch.setenv(variable, proxy.url)
        enrol(site, coordinator.host, coordinator.invite("north"))
        with Registrar(site) as registrar:
            registrar.call("ListPlans")
        (finding,) = doctor.fleet(site)
    assert "cannot be reached directly" in finding.found, "nothing listens there"
    assert proxy.asked == []


def test_the_certificate_behind_a_proxy_must_be_the_coordinators(
    coordinator, site, behind, monkeypatch
) -> None:
    """Whoever answers behind the proxy must be the name that was asked for."""
    with Proxy() as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        behind(f"{FAR}:{coordinator.enrolment_port}")
        record = site.coordinator_path.read_text()
        site.coordinator_path.write_text(record.replace(FAR, "elsewhere.example.net"))
        with Registrar(site) as registrar, pytest.raises(EnrolmentError, match="cannot be reached"):
            registrar.call("ListPlans")
    assert any(address.startswith("elsewhere") for address in proxy.asked)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("127.0.0.1:9", r"through proxy 127.0.0.1:9 \(HTTPS_PROXY\) \(.*\); check HTTPS_PROXY"),
        ("http://proxy:port", "HTTPS_PROXY cannot be read; expected http://HOST:PORT"),
        ("socks5://127.0.0.1:9", "HTTPS_PROXY: socks5:// proxies are not supported"),
    ],
)
def test_a_proxy_that_leads_nowhere_is_one_line_of_each_command(
    coordinator, site, behind, monkeypatch, value: str, told: str
) -> None:
    behind(coordinator.host)
    monkeypatch.setenv("HTTPS_PROXY", value)
    words = ["enroll", f"{FAR}:1", "--token", f"t.{'0' * 64}", "--home", str(site.path)]
    result = CliRunner().invoke(client_app, words)
    assert result.exit_code == 1
    assert re.search(told, result.output)
    assert result.output.count("\n") == 1
    listed = CliRunner().invoke(client_app, ["plan", "list", "--home", str(site.path)])
    assert listed.exit_code == 1
    assert re.search(r"HTTPS_PROXY.*; ", listed.output)
    assert listed.output.count("\n") == 1
    checked = {each.subject: each for each in doctor.examine(site)}
    for subject in ("fleet", "registrar"):
        assert checked[subject].verdict == "problem"
    assert "HTTPS_PROXY" in f"{checked['fleet'].found}{checked['fleet'].advice}"


def test_a_proxy_that_refuses_is_told_with_what_it_wants(
    coordinator, site, behind, monkeypatch
) -> None:
    behind(coordinator.host)
    program = "from crafts_client.cli import app; app()"
    words = [sys.executable, "-c", program, "leave", "--yes", "--home", str(site.path)]
    with Proxy(wants="Basic dXM6cHc=") as proxy:
        monkeypatch.setenv("https_proxy", proxy.address)
        monkeypatch.delenv("GRPC_VERBOSITY", raising=False)  # Flower sets it when it is imported
        (finding,) = doctor.fleet(site)
        left = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    through = f"through proxy {proxy.address} (https_proxy)"
    assert finding.found == f"{FAR}:{coordinator.registrar_port} is refused with 407 {through}"
    assert "USER:PASSWORD@HOST:PORT into https_proxy" in finding.advice
    assert through in left.stderr
    assert left.stderr.count("\n") == 1, "gRPC has a log of its own"


class TestDoctor:
    """Each thing that is wrong is named, with how to mend it; the other checks go on."""

    @pytest.fixture
    def enrolled(self, coordinator, site) -> SiteHome:
        enrol(site, coordinator.host, coordinator.invite("north"))
        return site

    def findings(self, site: SiteHome) -> dict[str, tuple[str, str]]:
        result = CliRunner().invoke(client_app, ["doctor", "--json", "--home", str(site.path)])
        found = {
            each["subject"]: (each["verdict"], each["found"]) for each in json.loads(result.stdout)
        }
        bad = any(verdict == "problem" for verdict, _ in found.values())
        assert result.exit_code == int(bad)
        return found

    def test_a_site_in_order(self, enrolled) -> None:
        found = self.findings(enrolled)
        bad = {subject for subject, (verdict, _) in found.items() if verdict != "ok"}
        assert bad == {"fleet", "signer", "audit"}, (
            "nothing listens there; the policy trusts another key; no audit was made here"
        )
        assert "cannot be reached directly" in found["fleet"][1]

    def test_a_site_before_anything(self, site) -> None:
        for name in ("tiles", "keys"):
            shutil.rmtree(site.path / name, ignore_errors=True)
        found = self.findings(site)
        assert found["enrolment"][0] == found["data"][0] == "problem"
        assert found["disk"][0] == "ok"

    def test_tls_inspection(self, enrolled, tmp_path, monkeypatch) -> None:
        other = Pki.create(tmp_path / "inspector", ["localhost"])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(other.folder / "server.crt", other.folder / "server.key")
        with self.listening(enrolled, context):
            assert "another authority" in self.findings(enrolled)["fleet"][1]

    @pytest.mark.parametrize(
        ("starts_days_ago", "ends_in_days", "host", "found", "advice"),
        [
            (-1, 9, "localhost", "not valid yet by this machine's clock", "set the clock"),
            (9, -1, "localhost", "has expired by this machine's clock", "restart crafts-server"),
            (1, 9, "elsewhere.example", "for another name", "add this name to hosts"),
            (1, 9, "10.0.0.1", "for another name", "add this name to hosts"),
        ],
    )
    def test_a_certificate_of_ours_that_is_refused(
        self, enrolled, coordinator, monkeypatch, starts_days_ago, ends_in_days, host, found, advice
    ) -> None:
        """It is told apart from another authority's, and clocks are compared."""
        monkeypatch.setattr(pki, "_BACKDATED", timedelta(days=starts_days_ago))
        monkeypatch.setattr(pki, "SERVER_DAYS", ends_in_days)
        folder, context = coordinator.pki.folder, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        (folder / "server.crt").unlink()
        coordinator.pki.renew([host])
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        with self.listening(enrolled, context, skew=timedelta(hours=5)):
            told = {finding.subject: finding for finding in doctor.fleet(enrolled)}
        assert found in told["fleet"].found
        assert advice in told["fleet"].advice
        assert told["clock"].verdict == "problem"

    @pytest.mark.parametrize(("hours", "verdict"), [(0, "ok"), (7, "problem")])
    def test_the_clock(self, enrolled, coordinator, hours: int, verdict: str) -> None:
        folder, context = coordinator.pki.folder, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        with self.listening(enrolled, context, skew=timedelta(hours=hours)):
            found = self.findings(enrolled)
        assert found["fleet"][0] == "ok"
        assert found["clock"][0] == verdict

    def test_revoked(self, enrolled, coordinator) -> None:
        coordinator.enrolments.revoke("north")
        assert "revoked or replaced" in self.findings(enrolled)["registrar"][1]

    def test_keys_that_others_may_read(self, enrolled) -> None:
        (enrolled.path / "keys" / "tls.key").chmod(0o640)
        assert self.findings(enrolled)["keys"][1] == "others may read tls.key"

    def test_a_device_that_is_not_there(self, enrolled) -> None:
        text = (enrolled.path / "site.toml").read_text()
        (enrolled.path / "site.toml").write_text(text.replace('"cpu"', '"cuda:7"'))
        if not torch.cuda.is_available():
            assert "finds no CUDA device" in self.findings(enrolled)["device"][1]

    @contextmanager
    def listening(self, site, context, *, skew=timedelta()) -> Iterator[None]:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(404)
                self.end_headers()

            def date_time_string(self, timestamp: float | None = None) -> str:
                return format_datetime(datetime.now(UTC) + skew, usegmt=True)

            def log_message(self, *_: object) -> None:
                pass

        with HTTPServer(("127.0.0.1", 0), Answer) as server:
            server.socket = context.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            record = json.loads(site.coordinator_path.read_text())
            record["fleet_address"] = f"localhost:{server.server_port}"
            site.coordinator_path.write_text(json.dumps(record))
            yield
            server.shutdown()


def test_an_unforeseen_error_keeps_its_text(coordinator, site, monkeypatch) -> None:
    enrol(site, coordinator.host, coordinator.invite("north"))

    def fails(*_: object) -> None:
        raise ValueError("/secret/path")

    monkeypatch.setattr(CoordinatorHome, "registry", fails)
    with Registrar(site) as registrar, pytest.raises(EnrolmentError) as caught:
        registrar.call("ListPlans")
    assert "secret" not in str(caught.value)
    assert "operator can see why" in str(caught.value)


def _request(key, name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    # A request may ask for anything; only its key and name are looked at.
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_a_site_cannot_ask_for_more_than_its_name(tmp_path: Path) -> None:
    pki = Pki.create(tmp_path / "pki", ["localhost"])
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = pki.sign_site(_request(key, "north"), "north")
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not constraints.ca
    certificate.verify_directly_issued_by(pki.ca)
    assert certificate.not_valid_after_utc < datetime.now(UTC) + timedelta(days=366)
    with pytest.raises(PkiError, match="for south"):
        pki.sign_site(_request(key, "north"), "south")
    with pytest.raises(PkiError, match="not EC P-256"):
        pki.sign_site(_request(rsa.generate_private_key(65537, 2048), "north"), "north")
    with pytest.raises(PkiError, match="cannot be read"):
        pki.sign_site(b"no request", "north")


def test_making_the_authority_again_changes_nothing_but_new_hosts(tmp_path: Path) -> None:
    pki = Pki.create(tmp_path / "pki", ["localhost"])
    before = {path.name: path.read_bytes() for path in pki.folder.iterdir()}
    Pki.create(tmp_path / "pki", ["localhost"])
    assert {path.name: path.read_bytes() for path in pki.folder.iterdir()} == before
    Pki.create(tmp_path / "pki", ["localhost", "10.0.0.1"])
    after = {path.name: path.read_bytes() for path in pki.folder.iterdir()}
    assert {name for name in before if before[name] == after[name]} == {"ca.key", "ca.crt"}
    assert {path.stat().st_mode & 0o777 for path in pki.folder.glob("*.key")} == {0o600}


def test_from_the_command_line(coordinator, site, foundation, tmp_path: Path, monkeypatch) -> None:
    """Invite, enrol, see plans, fetch the foundation again after half of a file."""
    plan = Plan.parse(plan_values(foundation.manifest.hash))
    coordinator.home.sign_plan(plan)
    server, client = CliRunner(), CliRunner()
    home = ["--home", str(coordinator.home.path)]
    invited = server.invoke(
        server_app, ["sites", "invite", "north", "--patients", "7", "--json", *home]
    )
    token = json.loads(invited.stdout)["token"]
    where = ["--home", str(site.path)]
    enrolled = client.invoke(client_app, ["enroll", coordinator.host, "--token", token, *where])
    assert enrolled.exit_code == 0, enrolled.stderr
    assert fingerprint(coordinator.pki.ca) in enrolled.stdout
    assert coordinator.home.public_key in enrolled.stdout, "says which key the policy lacks"
    again = client.invoke(client_app, ["enroll", coordinator.host, "--token", token, *where])
    assert again.exit_code == 1
    assert "ask for a new invitation" in again.stderr
    assert "north  enrolled" in server.invoke(server_app, ["sites", "list", *home]).stdout

    listed = json.loads(client.invoke(client_app, ["plan", "list", "--json", *where]).stdout)
    assert [each["hash"] for each in listed] == [plan.hash]
    assert "signer" in listed[0]["refused"][0]
    shown = client.invoke(client_app, ["plan", "show", plan.hash[:16], "--json", *where])
    assert Plan.parse(json.loads(shown.stdout)) == plan

    fetch = ["foundation", "fetch", "--json", *where]
    fetched = client.invoke(client_app, fetch)
    assert fetched.exit_code == 0, fetched.stderr
    folder = Path(json.loads(fetched.stdout)["foundation"])
    assert verify(folder) == foundation.manifest
    torn = max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    assert client.invoke(client_app, fetch).exit_code == 0
    assert torn.read_bytes() == whole
    torn.write_bytes(b"x" + whole[1:])
    refused = client.invoke(client_app, fetch)
    assert "is not what the manifest says; run the same command again" in refused.stderr
    assert client.invoke(client_app, fetch).exit_code == 0

    assert server.invoke(server_app, ["sites", "revoke", "north", "--yes", *home]).exit_code == 0
    late = client.invoke(client_app, ["plan", "list", *where])
    assert (late.exit_code, "revoked" in late.stderr) == (1, True)
