"""Putting a coordinator's key into the policy, where there is no editor. A person must have asked.

The file stays as its owner wrote it, but for the one line.
"""

import json
import re
import tomllib

from pydantic import ValidationError

from crafts_client.errors import HomeError
from crafts_client.home import POLICY_NAME, SiteHome
from crafts_client.policy import Policy
from crafts_core.durable import write_file
from crafts_privacy import signing

_LINE = re.compile(r"^allowed_signers[ \t]*=[ \t]*\[[^\[\]\n]*\][ \t]*$", re.MULTILINE)


def trust_signer(site: SiteHome, key: str) -> str:
    """From now on plans signed by this key may be shown, checked and approved here.

    Args:
        site: Whose policy.
        key: A public key, as ``enroll`` and ``crafts-server status`` print it. Again is fine.

    Returns:
        The key's fingerprint.

    Raises:
        SignatureError: this is no public key.
        HomeError: the policy has no such line, or cannot be written.
    """
    told = signing.fingerprint(key)
    if key in site.policy.allowed_signers:
        return told
    path = site.path / POLICY_NAME
    signers = (*site.policy.allowed_signers, key)
    by_hand = HomeError(
        f"{path} cannot be changed by this command; put the key into allowed_signers yourself"
    )
    try:
        text = path.read_text(encoding="utf-8")
        changed, num_lines = _LINE.subn(f"allowed_signers = {json.dumps(signers)}", text)
        policy = Policy.model_validate(tomllib.loads(changed))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise by_hand from error
    if num_lines != 1 or policy != site.policy.model_copy(update={"allowed_signers": signers}):
        raise by_hand
    write_file(path, changed, mode=path.stat().st_mode & 0o777)
    return told
