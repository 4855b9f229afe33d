from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolRequest(_message.Message):
    __slots__ = ("token", "signing_request_pem", "node_public_key", "identity_public_key", "identity_signature", "declared_patients")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SIGNING_REQUEST_PEM_FIELD_NUMBER: _ClassVar[int]
    NODE_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    DECLARED_PATIENTS_FIELD_NUMBER: _ClassVar[int]
    token: str
    signing_request_pem: bytes
    node_public_key: str
    identity_public_key: str
    identity_signature: str
    declared_patients: int
    def __init__(self, token: _Optional[str] = ..., signing_request_pem: _Optional[bytes] = ..., node_public_key: _Optional[str] = ..., identity_public_key: _Optional[str] = ..., identity_signature: _Optional[str] = ..., declared_patients: _Optional[int] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("site", "ca_pem", "certificate_pem", "signer", "registrar_address", "fleet_address")
    SITE_FIELD_NUMBER: _ClassVar[int]
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    SIGNER_FIELD_NUMBER: _ClassVar[int]
    REGISTRAR_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FLEET_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    site: str
    ca_pem: bytes
    certificate_pem: bytes
    signer: str
    registrar_address: str
    fleet_address: str
    def __init__(self, site: _Optional[str] = ..., ca_pem: _Optional[bytes] = ..., certificate_pem: _Optional[bytes] = ..., signer: _Optional[str] = ..., registrar_address: _Optional[str] = ..., fleet_address: _Optional[str] = ...) -> None: ...

class ListPlansRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SignedPlan(_message.Message):
    __slots__ = ("json", "signature", "public_key", "has_finished")
    JSON_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    HAS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    json: str
    signature: str
    public_key: str
    has_finished: bool
    def __init__(self, json: _Optional[str] = ..., signature: _Optional[str] = ..., public_key: _Optional[str] = ..., has_finished: bool = ...) -> None: ...

class ListPlansReply(_message.Message):
    __slots__ = ("plans",)
    PLANS_FIELD_NUMBER: _ClassVar[int]
    plans: _containers.RepeatedCompositeFieldContainer[SignedPlan]
    def __init__(self, plans: _Optional[_Iterable[_Union[SignedPlan, _Mapping]]] = ...) -> None: ...

class GetFoundationRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetFoundationReply(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    def __init__(self, manifest: _Optional[bytes] = ...) -> None: ...

class ReadFoundationRequest(_message.Message):
    __slots__ = ("path", "offset")
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    path: str
    offset: int
    def __init__(self, path: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class ReadFoundationReply(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class WitnessLedgerRequest(_message.Message):
    __slots__ = ("ledger", "entries", "head", "hash_at_witnessed")
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    HASH_AT_WITNESSED_FIELD_NUMBER: _ClassVar[int]
    ledger: str
    entries: int
    head: str
    hash_at_witnessed: str
    def __init__(self, ledger: _Optional[str] = ..., entries: _Optional[int] = ..., head: _Optional[str] = ..., hash_at_witnessed: _Optional[str] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WitnessLedgerReply(_message.Message):
    __slots__ = ("entries", "head")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    entries: int
    head: str
    def __init__(self, entries: _Optional[int] = ..., head: _Optional[str] = ...) -> None: ...

class DeclarePatientsRequest(_message.Message):
    __slots__ = ("declared_patients",)
    DECLARED_PATIENTS_FIELD_NUMBER: _ClassVar[int]
    declared_patients: int
    def __init__(self, declared_patients: _Optional[int] = ...) -> None: ...

class DeclarePatientsReply(_message.Message):
    __slots__ = ("agreed_patients",)
    AGREED_PATIENTS_FIELD_NUMBER: _ClassVar[int]
    agreed_patients: int
    def __init__(self, agreed_patients: _Optional[int] = ...) -> None: ...

class GetRosterRequest(_message.Message):
    __slots__ = ("plan_hash",)
    PLAN_HASH_FIELD_NUMBER: _ClassVar[int]
    plan_hash: str
    def __init__(self, plan_hash: _Optional[str] = ...) -> None: ...

class GetRosterReply(_message.Message):
    __slots__ = ("json", "signature")
    JSON_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    json: str
    signature: str
    def __init__(self, json: _Optional[str] = ..., signature: _Optional[str] = ...) -> None: ...

class PublishIdentityRequest(_message.Message):
    __slots__ = ("identity_public_key", "identity_signature")
    IDENTITY_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    identity_public_key: str
    identity_signature: str
    def __init__(self, identity_public_key: _Optional[str] = ..., identity_signature: _Optional[str] = ...) -> None: ...

class PublishIdentityReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SignedHead(_message.Message):
    __slots__ = ("site", "ledger", "ledger_id", "sequence", "hash", "signed_at", "public_key", "signature")
    SITE_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    LEDGER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    SIGNED_AT_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    site: str
    ledger: str
    ledger_id: str
    sequence: int
    hash: str
    signed_at: int
    public_key: str
    signature: str
    def __init__(self, site: _Optional[str] = ..., ledger: _Optional[str] = ..., ledger_id: _Optional[str] = ..., sequence: _Optional[int] = ..., hash: _Optional[str] = ..., signed_at: _Optional[int] = ..., public_key: _Optional[str] = ..., signature: _Optional[str] = ...) -> None: ...

class ExchangeHeadsRequest(_message.Message):
    __slots__ = ("mine", "held")
    MINE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    mine: SignedHead
    held: _containers.RepeatedCompositeFieldContainer[SignedHead]
    def __init__(self, mine: _Optional[_Union[SignedHead, _Mapping]] = ..., held: _Optional[_Iterable[_Union[SignedHead, _Mapping]]] = ...) -> None: ...

class ExchangeHeadsReply(_message.Message):
    __slots__ = ("of_you", "of_others")
    OF_YOU_FIELD_NUMBER: _ClassVar[int]
    OF_OTHERS_FIELD_NUMBER: _ClassVar[int]
    of_you: _containers.RepeatedCompositeFieldContainer[SignedHead]
    of_others: _containers.RepeatedCompositeFieldContainer[SignedHead]
    def __init__(self, of_you: _Optional[_Iterable[_Union[SignedHead, _Mapping]]] = ..., of_others: _Optional[_Iterable[_Union[SignedHead, _Mapping]]] = ...) -> None: ...
