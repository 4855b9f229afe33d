"""The key of this site, and what is signed with it: the ledger's head, and its word in sums.

The key is made when it is first needed and stays as long as the ledger: others know the site by its
fingerprint. A ledger in use whose key is gone is not given a new one in silence.
"""

import os

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from crafts_client.errors import HomeError
from crafts_client.home import SiteHome
from crafts_core.durable import sync
from crafts_privacy import signing
from crafts_privacy.ledger import Ledger, LedgerHead
from crafts_privacy.signed_head import SignedHead


def site_key(home: SiteHome, ledger: Ledger | None) -> Ed25519PrivateKey:
    """The site's key; a new one only where the ledger, if there is one, has not been in use.

    Raises:
        HomeError: the key is missing.
        SignatureError: it cannot be read.
    """
    if not home.site_key_path.exists():
        if ledger is not None and ledger.is_bound():
            raise HomeError(
                f"{home.site_key_path} is missing; put it back, or make a new one (openssl genpkey "
                f"-algorithm ed25519 -out {home.site_key_path}) and tell everybody who knows this "
                "site's fingerprint"
            )
        _make(home)
    return signing.load_signing_key(home.site_key_path)


def _make(home: SiteHome) -> None:
    """Make the key, whole or not at all; one that another process made meanwhile stays."""
    path = home.site_key_path
    path.parent.mkdir(mode=0o700, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)  # of a process that was killed
    signing.create_signing_key(new)
    try:
        os.link(new, path)  # never replaces
    except FileExistsError:
        pass
    finally:
        new.unlink()
    sync(path.parent)
    sync(home.path)


def signed_head(home: SiteHome, ledger: Ledger, head: LedgerHead | None = None) -> SignedHead:
    """The ledger's head now, signed, or an earlier one."""
    key, head = site_key(home, ledger), head or ledger.verify()
    return SignedHead.sign(key, head, site=home.config.name, ledger=home.ledger_name)
