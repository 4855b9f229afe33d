"""The contract between sites and the registrar: messages, and the names of the calls.

``registrar.proto`` is the contract; ``registrar_pb2.py`` is generated from it. Which messages each
call takes and gives is read from the descriptor, so neither side can drift from the file.
"""

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from crafts_core.registrar import registrar_pb2 as messages

__all__ = ["ENROLMENT", "REGISTRAR", "Call", "calls_of", "messages"]

ENROLMENT, REGISTRAR = "Enrolment", "Registrar"


@dataclass(frozen=True, slots=True)
class Call:
    """One remote call."""

    service: str
    """Full name, as on the wire."""
    name: str
    request: type[Message]
    reply: type[Message]

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


def calls_of(service: str) -> dict[str, Call]:
    """All calls of a service of the contract, by name."""
    descriptor: Any = messages.DESCRIPTOR.services_by_name[service]
    return {
        method.name: Call(
            descriptor.full_name,
            method.name,
            GetMessageClass(method.input_type),
            GetMessageClass(method.output_type),
        )
        for method in descriptor.methods
    }
