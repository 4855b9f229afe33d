"""The certificate by which the coordinator knows this site: until when it is valid.

It ends a year after enrolment. From then on no call is answered, and no round leaves the site.
"""

from datetime import UTC, datetime

from cryptography import x509

from crafts_client.home import SiteHome

EXPIRES_SOON_DAYS = 30
RENEW = (
    "ask the coordinator for a new invitation (crafts-server sites invite), then run: "
    "crafts-client enroll HOST --token TOKEN, and start join again"
)


def days_left(home: SiteHome) -> int | None:
    """Whole days until the certificate ends, below 0 once it has; None before any enrolment.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    try:
        pem = (home.path / "keys" / "tls.crt").read_bytes()
    except FileNotFoundError:
        return None
    return (x509.load_pem_x509_certificate(pem).not_valid_after_utc - datetime.now(UTC)).days


def expiry_warning(home: SiteHome) -> str:
    """What to do about a certificate that ends soon or has ended; empty while there is time."""
    try:
        days = days_left(home)
    except (OSError, ValueError):
        return f"the site's certificate cannot be read; {RENEW}"
    if days is None or days >= EXPIRES_SOON_DAYS:
        return ""
    told = "has expired" if days < 0 else f"ends in {days} day{'' if days == 1 else 's'}"
    return f"the site's certificate {told}; {RENEW}"
