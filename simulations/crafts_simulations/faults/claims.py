"""A site that declares what would make it count for more, or sends what the gate likes best.

Ten real sites in one process, with the public probe and its alignment gate in the loop. The
attacker knows all that is public: foundation, plan, probe, checkpoint. Its first answer is honest,
or as bad as can be, so that the receipts can say by how much its weight rose.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from crafts_client.client_app import HOME_KEY, make_client_app
from crafts_client.home import SiteHome
from crafts_client.messages import read_message, read_state
from crafts_client.site import Site
from crafts_core.array_bytes import PACKED, packed
from crafts_core.exchange import global_norm, inner_product
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.starting_point import initial_state
from crafts_core.state import State
from crafts_server.aggregation import PublicProbe
from crafts_server.collection import Patience
from crafts_server.coordinator import Coordinator
from crafts_server.probe import FoundationProbe, ProbeSize
from crafts_server.receipts import RoundReceipt
from crafts_simulations.faults.case import Case, Experiment, check_ledgers, expect
from crafts_simulations.faults.messages import HOSTILE, NAMED
from crafts_simulations.local_grid import LocalGrid, LocalNode, TurnsHere
from crafts_simulations.small_study import NUM_PATIENTS, SmallStudy, make_small_study

_NUM_SITES = 10
_TYPED_PATIENTS = 4000
_SIZE = ProbeSize(margin_tiles=16, margin_draws=1, step_tiles=8)
_NUM_DIRECTIONS = 6
_LENGTHS = (0.3, 0.6, 1.0)
"""Of a candidate, beside the honest update that it replaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One round, as the attacker sees it."""

    number: int
    state: State
    probe: PublicProbe
    honest: State
    """What its own patients and noise gave."""


Answer = tuple[State, dict[str, int | float]]
"""What it sends, and what it declares otherwise than it should."""
Attack = Callable[[Turn], Answer]


def no_noise(turn: Turn) -> Answer:
    """A directed update as long as clipping alone allows, and a noise of nothing."""
    if turn.number == 1:
        return turn.honest, {}
    return _scaled(_gradient(turn), -0.7 * global_norm(turn.honest)), {"noise_multiplier": 1e-9}


def typed_patients(turn: Turn) -> Answer:
    """What honest code sends when somebody has typed 4,000 into ``site.toml``."""
    if turn.number == 1:
        return turn.honest, {}
    smaller = {name: value * NUM_PATIENTS / _TYPED_PATIENTS for name, value in turn.honest.items()}
    return smaller, {"declared_patients": _TYPED_PATIENTS}


def liked_by_the_gate(turn: Turn) -> Answer:
    """Of all that it could send, first what the gate likes least and then what it likes most."""
    slope = turn.probe.margin_gradient(turn.state, "second")
    ranked = sorted(_candidates(turn, slope), key=lambda delta: inner_product(slope, delta))
    return ranked[0 if turn.number == 1 else -1], {}


def refused(attack: Attack) -> Experiment:
    """The second round goes without it, and it is named."""

    def experiment(folder: Path, foundation: Foundation) -> str:
        _, second = _two_rounds(folder, foundation, attack, learning_rate=0.01, temperature=0.05)
        expect(
            [each.site for each in second.refused] == [HOSTILE],
            f"nobody was refused; it had weight {_weight(second):.2f}",
        )
        expect(len(second.sites) == _NUM_SITES - 1, "an honest site was not used")
        return f"{second.refused[0].reason}; the others weighed {_largest(second):.2f} at most"

    return experiment


def held_to_its_share(attack: Attack) -> Experiment:
    """Nothing in its answer is wrong: it counts twice its share at most, and the rise is told."""

    def experiment(folder: Path, foundation: Foundation) -> str:
        first, second = _two_rounds(
            folder, foundation, attack, learning_rate=1.0, temperature=0.002
        )
        expect(not second.refused, "it was refused, so this shows nothing of the cap")
        cap = 2.0 / _NUM_SITES
        expect(_weight(second) <= cap + 1e-9, f"it had weight {_weight(second):.2f}")
        expect(_largest(second) <= cap + 1e-9, f"a site had weight {_largest(second):.2f}")
        expect(HOSTILE in {rise.site for rise in second.rises}, "its rise was not told")
        return f"weight {_weight(first):.2f}, then {_weight(second):.2f}, told as a rise"

    return experiment


def _two_rounds(
    folder: Path,
    foundation: Foundation,
    attack: Attack,
    *,
    learning_rate: float,
    temperature: float,
) -> tuple[RoundReceipt, RoundReceipt]:
    study = make_small_study(
        folder,
        foundation,
        num_sites=_NUM_SITES,
        min_sites=_NUM_SITES - 1,
        learning_rate=learning_rate,
        aggregation={"rule": "alignment_regularized", "gate_temperature": temperature},
    )
    honest = make_client_app(lambda path: Site(SiteHome.open(path), foundation))
    apps = dict.fromkeys(study.sites, honest)
    apps[HOSTILE] = _attacker(honest, study, foundation, attack)
    nodes = {
        name: LocalNode(app=apps[name], node_config={HOME_KEY: str(path)})
        for name, path in study.sites.items()
    }
    coordinator = Coordinator(
        *(study.coordinator, study.plan, foundation),
        patience=Patience(poll_s=0.0, join_wait_s=0.0),
        probe_size=_SIZE,
    )
    coordinator.run(LocalGrid(TurnsHere(nodes)))
    chain = coordinator.chain()
    check_ledgers(chain, study.sites)
    first, second = (checkpoint.receipt() for checkpoint in chain[1:])
    expect(len(first.sites) == _NUM_SITES, "the first round did not use all")
    return first, second


def _attacker(
    honest: ClientApp, study: SmallStudy, foundation: Foundation, attack: Attack
) -> ClientApp:
    """The honest app, whose answers are replaced on the way out."""
    app, plan = ClientApp(), study.plan
    like = initial_state(foundation, plan.adapter, plan.study.seed, plan.parts)
    probe = _probe(foundation, plan)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        answer = honest(message, context)
        request = read_message(message)
        number, factor = request.request.round, request.request.factor
        state = read_state(request.adapter, like)
        schema = {name: state[name] for name in state if name.endswith(f".{factor}")}
        turn = Turn(
            number=number,
            state=state,
            probe=probe.for_round(number),
            honest=read_state(answer.content.array_records["delta"], schema),
        )
        delta, declared = attack(turn)
        return Message(_rewritten(answer.content, delta, declared), reply_to=message)

    return app


def _rewritten(content: RecordDict, delta: State, declared: dict[str, int | float]) -> RecordDict:
    values = packed(delta, torch.float16)
    sent = {name: tensor.half() for name, tensor in delta.items()}
    changes = {"update_norm": global_norm(sent), **declared}
    content["reply"] = ConfigRecord({**content.config_records["reply"], **changes})
    content["delta"] = ArrayRecord({PACKED: Array.from_numpy_ndarray(values)})
    return content


def _probe(foundation: Foundation, plan: Plan) -> FoundationProbe:
    """The coordinator's, to the last draw: all of it is public."""
    return FoundationProbe(
        foundation, plan.adapter, seed=plan.study.seed, size=_SIZE, parts=plan.parts
    )


def _candidates(turn: Turn, slope: State) -> list[State]:
    """Along the margin's public gradient, against it, and in some directions at random."""
    generator = torch.Generator().manual_seed(turn.number)
    ways: list[State] = [slope, turn.honest]
    for _ in range(_NUM_DIRECTIONS):
        ways.append(
            {
                name: torch.randn(value.shape, generator=generator)
                for name, value in turn.honest.items()
            }
        )
    length = global_norm(turn.honest)
    return [
        _scaled(way, sign * part * length) for way in ways for part in _LENGTHS for sign in (1, -1)
    ]


def _gradient(turn: Turn) -> State:
    return turn.probe.alignment_gradient(turn.state, "second")


def _scaled(way: State, length: float) -> State:
    factor = length / global_norm(way)
    return {name: factor * value for name, value in way.items()}


def _weight(receipt: RoundReceipt) -> float:
    return sum(site.weight for site in receipt.sites if site.site == HOSTILE)


def _largest(receipt: RoundReceipt) -> float:
    return max(site.weight for site in receipt.sites)


CASES: tuple[Case, ...] = (
    Case(
        group="weight",
        fault="one of ten declares noise 1e-9, with a directed update",
        must_hold=NAMED,
        experiment=refused(no_noise),
    ),
    Case(
        group="weight",
        fault="one of ten declares 4,000 patients, as by a typo",
        must_hold=NAMED,
        experiment=refused(typed_patients),
    ),
    Case(
        group="weight",
        fault="one of ten lies low, then sends what the gate likes best",
        must_hold="it counts twice its share at most; the rise is in the receipt",
        experiment=held_to_its_share(liked_by_the_gate),
    ),
)
