"""The registrar: enrolment for invited sites, and plans, foundation and witness for enrolled ones.

Two gRPC servers on two ports, because only one of them may be reached without a certificate:

* *enrolment* shows the self-signed certificate whose fingerprint is in the invitation;
* *registrar* asks for a client certificate, and every call checks that it is the one that was
  issued for that site and not revoked since.

What a site is told about an error is a status and one sentence of ours; everything else is logged
here and answered with INTERNAL.
"""

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from crafts_core.errors import CraftsError
from crafts_core.foundation_manifest import MANIFEST_NAME, FoundationManifest, read_manifest
from crafts_core.plan import Plan
from crafts_core.registrar import ENROLMENT, REGISTRAR, calls_of, messages
from crafts_core.roster import Roster
from crafts_privacy.signed_head import SignedHead
from crafts_server.audit_log import Event
from crafts_server.enrolments import Enrolments, Witness
from crafts_server.errors import EnrolmentError, PkiError, RegistryError
from crafts_server.home import CoordinatorHome
from crafts_server.node_keys import check_node_key
from crafts_server.pki import Pki, common_name, fingerprint
from crafts_server.rosters import Rosters, check_own_key
from crafts_server.signed_heads import SignedHeads

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
_MAX_OFFSET = 1 << 40
_MAX_REQUEST_BYTES = 128 * 1024  # the heads that a site holds of a hundred others
_WORKERS = 8
_INTERNAL = "the coordinator failed; its operator can see why"

HANDSHAKE_MS = 20_000
IDLE_MS = 60_000
OnRefused = Callable[[str], None]
"""The name of a call: called for each that is refused."""


def _ignore(_call: str) -> None:
    pass


OnEnrolled = Callable[[str, str], None]
"""Site and its node's public key: called before the site is told yes."""


class RefusedError(Exception):
    """A call that is answered with a status and a public sentence."""

    def __init__(self, status: grpc.StatusCode, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class EnrolmentService:
    """What a stranger with an invitation may ask."""

    def __init__(
        self,
        enrolments: Enrolments,
        pki: Pki,
        *,
        signer: str,
        registrar_address: str,
        fleet_address: str,
        on_enrolled: OnEnrolled,
    ) -> None:
        self._enrolments = enrolments
        self._pki = pki
        self._told = {
            "signer": signer,
            "registrar_address": registrar_address,
            "fleet_address": fleet_address,
        }
        self._on_enrolled = on_enrolled

    def Enrol(self, request: Any, _context: grpc.ServicerContext) -> Any:  # noqa: N802
        """A certificate for the invited name."""
        try:
            site = self._enrolments.invited_site(request.token)
            check_node_key(request.node_public_key)
            certificate = self._pki.sign_site(request.signing_request_pem, site)
            check_own_key(site, request.identity_public_key, request.identity_signature)
            self._enrolments.enrol(
                request.token,
                fingerprint=fingerprint(certificate),
                node_public_key=request.node_public_key,
                identity_public_key=request.identity_public_key,
                declared_patients=request.declared_patients,
            )
        except (EnrolmentError, PkiError) as error:
            raise RefusedError(grpc.StatusCode.PERMISSION_DENIED, str(error)) from error
        self._on_enrolled(site, request.node_public_key)
        log.info("enrolled site=%s", site)
        return messages.EnrolReply(
            site=site,
            ca_pem=self._pki.ca_path.read_bytes(),
            certificate_pem=certificate.public_bytes(Encoding.PEM),
            **self._told,
        )


class RegistrarService:
    """What an enrolled site may ask. ``context`` says which site it is."""

    def __init__(self, home: CoordinatorHome, enrolments: Enrolments, heads: SignedHeads) -> None:
        self._home = home
        self._enrolments = enrolments
        self._heads = heads
        self._contacts = home.contacts
        self._foundation: Path = home.foundation_path
        self._manifest: FoundationManifest = read_manifest(self._foundation)

    def ListPlans(self, _request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Every signed plan; of sums, once its roster is fixed."""
        self._site(context)
        with self._home.registry() as registry:
            plans, finished = registry.offered_plans(), registry.finished_plans()
        return messages.ListPlansReply(
            plans=[
                messages.SignedPlan(
                    json=plan.json,
                    signature=plan.signature,
                    public_key=plan.public_key,
                    has_finished=plan.hash in finished,
                )
                for plan in plans
            ]
        )

    def GetFoundation(self, _request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """The manifest of the study's foundation."""
        self._site(context)
        manifest = (self._foundation / MANIFEST_NAME).read_bytes()
        return messages.GetFoundationReply(manifest=manifest)

    def ReadFoundation(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """A piece of one of the manifest's files. No other file of this machine can be named."""
        self._site(context)
        if request.path not in self._manifest.files:
            raise RefusedError(grpc.StatusCode.NOT_FOUND, "the foundation has no such file")
        if request.offset > _MAX_OFFSET:
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "no file is that long")
        with (self._foundation / request.path).open("rb") as file:
            file.seek(request.offset)
            return messages.ReadFoundationReply(data=file.read(CHUNK_BYTES))

    def WitnessLedger(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Keep a ledger's head; refuse one that does not continue what was kept."""
        site = self._site(context)
        try:
            kept = self._enrolments.witness(
                site,
                request.ledger,
                Witness(entries=request.entries, head=request.head),
                request.hash_at_witnessed,
            )
        except EnrolmentError as error:
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
        return messages.WitnessLedgerReply(entries=kept.entries, head=kept.head)

    def ExchangeHeads(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Keep what the site signed and holds of others; give what they signed and hold of it."""
        site = self._site(context)
        try:
            mine = SignedHead.of(request.mine)
            held = [SignedHead.of(head) for head in request.held]
            of_you, of_others = self._heads.exchange(site, mine, held)
        except ValueError as error:
            raise RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION, "this is no signed head of a ledger"
            ) from error
        except EnrolmentError as error:
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
        return messages.ExchangeHeadsReply(
            of_you=[messages.SignedHead(**head.model_dump()) for head in of_you],
            of_others=[messages.SignedHead(**head.model_dump()) for head in of_others],
        )

    def Leave(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802, ARG002
        """The site goes by its own wish; its certificate and node count no more."""
        site = self._site(context)
        self._enrolments.revoke(site)
        log.info("left site=%s", site)
        self._home.audit_log.write(Event.LEFT, site=site)
        return messages.LeaveReply()

    def DeclarePatients(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Note the number that the site says; what was agreed stays until both say the same."""
        site = self._site(context)
        if request.declared_patients:
            try:
                self._enrolments.sizes.declare(site, request.declared_patients)
            except EnrolmentError as error:
                raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
            log.info("declared site=%s patients=%d", site, request.declared_patients)
        return messages.DeclarePatientsReply(
            agreed_patients=self._enrolments.sizes.agreed().get(site, 0)
        )

    def PublishIdentity(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Note the key that signs for the site in rosters to come."""
        site = self._site(context)
        try:
            check_own_key(site, request.identity_public_key, request.identity_signature)
            self._enrolments.rosters.publish(site, request.identity_public_key)
        except EnrolmentError as error:
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
        log.info("identity site=%s", site)
        return messages.PublishIdentityReply()

    def GetRoster(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Who takes part in a plan and with how many patients, signed.

        As of now, or of sums as it was fixed with the plan.
        """
        self._site(context)
        try:
            with self._home.registry() as registry:
                signed = registry.plan(request.plan_hash)
                plan = Plan.parse(json.loads(signed.json))
                roster = (
                    Rosters(registry).fixed(plan)
                    if plan.aggregation.secure_aggregation
                    else Roster.of(signed.hash, self._enrolments.sizes.agreed())
                )
        except RegistryError as error:
            raise RefusedError(grpc.StatusCode.NOT_FOUND, "no such plan was signed") from error
        return messages.GetRosterReply(
            json=roster.to_json(), signature=self._home.sign_roster(roster)
        )

    def _site(self, context: grpc.ServicerContext) -> str:
        """The site that the client certificate speaks for; it was seen just now."""
        pem = context.auth_context().get("x509_pem_cert", [b""])[0]
        try:
            certificate = x509.load_pem_x509_certificate(pem)
        except ValueError as error:
            raise RefusedError(grpc.StatusCode.UNAUTHENTICATED, "no client certificate") from error
        site = common_name(certificate)
        if not self._enrolments.is_enrolled(site, fingerprint(certificate)):
            raise RefusedError(
                grpc.StatusCode.PERMISSION_DENIED,
                "this certificate is revoked or replaced; ask the coordinator",
            )
        self._contacts.note(site)
        return site


def enrolment_server(
    service: EnrolmentService, pki: Pki, address: str, *, on_refused: OnRefused = _ignore
) -> tuple[grpc.Server, int]:
    """The enrolment server, started, and its port (``address`` may ask for port 0)."""
    credentials = grpc.ssl_server_credentials([pki.pair("enrolment")])
    return _start(ENROLMENT, service, credentials, address, on_refused)


def registrar_server(
    service: RegistrarService, pki: Pki, address: str, *, on_refused: OnRefused = _ignore
) -> tuple[grpc.Server, int]:
    """The registrar, started; it speaks only to who shows a certificate of our authority."""
    credentials = grpc.ssl_server_credentials(
        [pki.pair("server")],
        root_certificates=pki.ca_path.read_bytes(),
        require_client_auth=True,
    )
    return _start(REGISTRAR, service, credentials, address, on_refused)


def _start(
    name: str,
    service: object,
    credentials: grpc.ServerCredentials,
    address: str,
    on_refused: OnRefused,
) -> tuple[grpc.Server, int]:
    server = grpc.server(
        ThreadPoolExecutor(_WORKERS, thread_name_prefix=name),
        options=[
            ("grpc.max_receive_message_length", _MAX_REQUEST_BYTES),
            ("grpc.so_reuseport", 0),
            # Strangers may connect, and hold a connection no longer than a call takes.
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.max_connection_idle_ms", IDLE_MS),
        ],
    )
    calls = calls_of(name)
    handlers: Mapping[str, grpc.RpcMethodHandler] = {
        call.name: grpc.unary_unary_rpc_method_handler(
            _guarded(getattr(service, call.name), on_refused),
            request_deserializer=call.request.FromString,
            response_serializer=call.reply.SerializeToString,
        )
        for call in calls.values()
    }
    full_name = next(iter(calls.values())).service
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(full_name, handlers)])
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise CraftsError(
            f"cannot listen on {address} for {name.lower()}; is another coordinator running, or "
            "listen in coordinator.toml no address of this machine?"
        ) from error
    server.start()
    return server, port


def _guarded(
    handle: Callable[[Any, grpc.ServicerContext], Any], on_refused: OnRefused
) -> Callable[..., Any]:
    """Nothing of an unforeseen error's text leaves."""

    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return handle(request, context)
        except RefusedError as refused:
            peer = context.peer()
            log.warning(
                "refused call=%s status=%s peer=%s", handle.__name__, refused.status.name, peer
            )
            on_refused(handle.__name__)
            context.abort(refused.status, str(refused))
        except Exception:
            log.exception("failed call=%s", handle.__name__)
            context.abort(grpc.StatusCode.INTERNAL, _INTERNAL)
        raise AssertionError("abort raises")

    return answer
