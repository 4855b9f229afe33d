"""A plan as it travels: the coordinator's exact bytes and its signature over them.

Checked in this order: size, signer, signature, and only then is anything parsed.
"""

import hmac
import json

from crafts_client.policy import Policy, PolicyError, Rule
from crafts_core.exchange import SignedPlan
from crafts_core.plan import Plan, PlanError
from crafts_privacy import signing

MAX_PLAN_BYTES = 256 * 1024


def open_signed_plan(signed: SignedPlan, policy: Policy) -> Plan:
    """Verify and parse.

    Raises:
        PolicyError: rule ``signer`` or ``signature``.
        PlanError: a trusted signer signed something that is not a plan.
    """
    payload = signed.json.encode()
    if len(payload) > MAX_PLAN_BYTES:
        raise PlanError(f"expected a plan of at most {MAX_PLAN_BYTES} bytes, got {len(payload)}")
    signer = signed.public_key.encode()
    if not any(hmac.compare_digest(signer, key.encode()) for key in policy.allowed_signers):
        raise PolicyError(
            Rule.SIGNER,
            "the plan's signer is not in allowed_signers; `crafts-client doctor` says what to "
            "compare by telephone before it is let in",
        )
    try:
        signing.verify(signed.public_key, payload, signed.signature)
    except signing.SignatureError as error:
        raise PolicyError(Rule.SIGNATURE, str(error)) from error
    try:
        values = json.loads(signed.json)
    except (ValueError, RecursionError) as error:
        raise PlanError("the signed plan is not JSON") from error
    return Plan.parse(values)
