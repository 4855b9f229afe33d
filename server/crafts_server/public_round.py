"""A public round: no site is asked. The coordinator trains on public tiles that it picks.

What it picks by, and paints them with, was told and paid for in the rounds before. A round like any
other besides: committed with a receipt, and made again from the same checkpoint where it was cut.
"""

from crafts_core.exchange import global_norm
from crafts_server.aggregation import ServerStep
from crafts_server.collection import Replies
from crafts_server.errors import CheckpointError
from crafts_server.open_round import OpenRound, Outcome


def public_round(opened: OpenRound) -> Outcome:
    """Pick, train, and go on with what came of it: there is no step of sites to be halved.

    Raises:
        PoolError: the plan's pool is not in this home.
        RunStoppedError: somebody stopped the run; what was trained so far is gone on with.
    """
    study = opened.study
    found = study.retrieve(opened.state, _unknown(opened), lambda: study.patience.sleep(0.0))
    probe = study.probe_of_round(opened.planned.round)
    moved = {name: found.state[name] - tensor for name, tensor in opened.state.items()}
    return Outcome(
        step=ServerStep(
            state=found.state,
            server_state=opened.parent.server_state(),
            margin_after=probe.margin(found.state),
            step_norm=global_norm(moved),
            trust_norm=0.0,
            step_scale=1.0,
        ),
        margin_before=probe.margin(opened.state),
        sites=(),
        replies=Replies(num_asked=0, num_accepted=0, refused=(), missing=()),
        retrieval=found.record,
    )


def _unknown(opened: OpenRound) -> tuple[bool, ...]:
    """Captions whose anchor is public text, as the receipt of stage anchors says."""
    for checkpoint in opened.chain[1:]:
        receipt = checkpoint.receipt()
        if receipt.stage == "anchors" and receipt.release is not None:
            return receipt.release.is_public
    raise CheckpointError("no committed round says what the study's captions look like")
