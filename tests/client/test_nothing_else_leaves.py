"""Marked identifiers at a site, rounds that work or fail, and a look at all that left."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from crafts_client import site as site_module
from crafts_client.client_app import HOME_KEY, make_client_app
from crafts_client.home import SiteHome
from crafts_client.site import Site
from crafts_server.collection import Patience
from crafts_server.coordinator import Coordinator
from crafts_server.errors import AggregationError
from crafts_simulations.local_grid import LocalGrid, LocalNode, TurnsHere
from crafts_simulations.small_study import SmallStudy, make_small_study

MARKS = ("patient00", "slide00", "tissue with", "sites/site-", "hospital-secret")
"""Patients, slides, captions and paths of the small study, and a word in an exception."""


@pytest.fixture
def study(tmp_path: Path, foundation) -> SmallStudy:
    return make_small_study(tmp_path / "hospital-secret", foundation)


class Wire:
    """Every byte that passes from sites to the coordinator, as text and as it is."""

    def __init__(self, app: ClientApp) -> None:
        self.left: list[bytes] = []
        self.app = ClientApp()

        @self.app.train()
        def train(message: Message, context: Context) -> Message:
            reply = app(message, context)
            self.left += _everything_in(reply)
            return reply


def _everything_in(message: Message) -> Iterator[bytes]:
    yield repr(vars(message.metadata)).encode()
    if message.has_error():
        yield f"{message.error.code} {message.error.reason}".encode()
        return
    for name, record in message.content.items():
        yield name.encode()
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                yield key.encode()
                yield array.data
        else:
            assert isinstance(record, ConfigRecord)
            yield repr(dict(record)).encode()


def rounds(study: SmallStudy, foundation) -> Wire:
    wire = Wire(make_client_app(lambda path: Site(SiteHome.open(path), foundation)))
    nodes = {
        name: LocalNode(app=wire.app, node_config={HOME_KEY: str(path)})
        for name, path in study.sites.items()
    }
    now = Patience(poll_s=0.0, join_wait_s=0.0)
    try:
        Coordinator(study.coordinator, study.plan, foundation, patience=now).run(
            LocalGrid(TurnsHere(nodes))
        )
    except AggregationError as error:
        wire.left.append(str(error).encode())
    return wire


def fails_with_a_name(*_: object, **__: object) -> None:
    raise KeyError("patient0003 of hospital-secret, slide0003.svs")


def damage_tiles(study: SmallStudy) -> None:
    shard = next(study.sites["site-1"].glob("tiles/**/*.tar"))
    shard.write_bytes(shard.read_bytes()[:1000])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "exception", "tiles", "latents", "ledger", "home"])
def test_no_identifier_leaves_by_network_log_exception_or_registry(
    study, foundation, fault: str, monkeypatch, caplog
) -> None:
    site = study.sites["site-1"]
    match fault:
        case "exception":
            monkeypatch.setattr(site_module.Trainer, "train", fails_with_a_name)
        case "tiles":
            damage_tiles(study)
        case "latents":
            for file in site.glob("tiles/latents/**/*"):
                if file.is_file():
                    file.write_bytes(b"patient0001")
        case "ledger":
            (site / "ledger.db").write_bytes(b"patient0001")
        case "home":
            (site / "site.toml").write_text('name = "patient0001"')
    with caplog.at_level(logging.INFO):
        wire = rounds(study, foundation)
    if fault == "none":
        assert len(wire.left) > 8
    kept = [path for path in study.coordinator.path.rglob("*") if path.is_file()]
    assert {"registry.db", "manifest.json"} <= {path.name for path in kept}
    everything = [*wire.left, caplog.text.encode(), *(path.read_bytes() for path in kept)]
    for mark in MARKS:
        # The coordinator's own files may name the folder that this test put them in.
        here = str(study.coordinator.path.parent).encode()
        for content in everything:
            assert mark.encode() not in content.replace(here, b""), mark


def test_the_look_would_find_what_it_looks_for(study, foundation, caplog) -> None:
    with caplog.at_level(logging.INFO):
        logging.getLogger("crafts_client").info("training on patient0001")
    assert any(mark in caplog.text for mark in MARKS)
