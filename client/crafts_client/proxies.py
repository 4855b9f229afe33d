"""Which proxy leads to an address: one answer for enrolment, registrar, rounds and doctor.

gRPC, httpx and http.client read the environment by rules of their own, which differ. Here it is
read once, as curl and git read it, and each of them is told the answer and reads nothing itself.

::

    https_proxy, HTTPS_PROXY    the proxy: [http://][USER:PASSWORD@]HOST[:PORT]
    all_proxy, ALL_PROXY        the same, where the others say nothing
    no_proxy, NO_PROXY          what is reached directly; loopback always is

Small letters go before capitals. A proxy's address may hold a password: it is never in a message.
"""

import ipaddress
import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import quote, unquote, urlsplit

from crafts_client.errors import EnrolmentError

_DEFAULT_PORT = 80
"""What a URL without a port means."""
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*", re.IGNORECASE)
_EXCEPTION = re.compile(r"(?P<host>\[[^\]]*\]|[^\[\]:/]+)(:(?P<port>[0-9]+))?")
_UNSUPPORTED = {"https", "socks", "socks4", "socks4a", "socks5", "socks5h"}
_PROXY_FORM = (
    "expected http://HOST:PORT or http://USER:PASSWORD@HOST:PORT (signs in a password as %XX)"
)
_EXCEPTION_FORM = (
    "expected names, .suffixes, addresses or networks such as 10.0.0.0/8, a :PORT behind a name or "
    "an address if only that is meant, and commas between"
)
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """An HTTP proxy that is asked for a tunnel."""

    host: str
    port: int
    variable: str
    """Where it was read."""
    credentials: tuple[str, str] | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """With the password: for clients, not for people."""
        if self.credentials is None:
            return f"http://{self.address}"
        user, password = (quote(each, safe="") for each in self.credentials)
        return f"http://{user}:{password}@{self.address}"

    @property
    def headers(self) -> dict[str, str]:
        """What it wants to see with the request for a tunnel."""
        if self.credentials is None:
            return {}
        text = b64encode(":".join(self.credentials).encode()).decode()
        return {"Proxy-Authorization": f"Basic {text}"}


def proxy_for(address: str, environ: Mapping[str, str]) -> Proxy | None:
    """What the environment says of the way to ``HOST:PORT``.

    Returns:
        The proxy, or None: the way is direct. So it is for loopback, whatever is set.

    Raises:
        EnrolmentError: a variable that matters here cannot be read; the text names it and the form
            that it wants, and holds nothing of a proxy's address.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]").rstrip(".").lower()
    if _is_loopback(host):
        return None
    variable, value = _first_set(environ, "https_proxy", "all_proxy")
    if not value:
        return None
    excepting, exceptions = _first_set(environ, "no_proxy")
    for each in re.split(r"[,\s]+", exceptions):
        if each and _is_excepted(host, port, each, excepting):
            return None
    return _parse(value, variable)


def way(proxy: Proxy | None) -> str:
    """In words."""
    return f"through proxy {proxy.address} ({proxy.variable})" if proxy else "directly"


def environment_with(proxy: Proxy | None, environ: Mapping[str, str]) -> dict[str, str]:
    """For a program that talks to one address beyond loopback: the answer, and nothing to read."""
    kept = {name: environ[name] for name in environ if not name.lower().endswith("_proxy")}
    if proxy is None:
        return kept | {"no_proxy": "*"}
    return kept | {"https_proxy": proxy.url, "no_proxy": "127.0.0.1,localhost,::1"}


def _first_set(environ: Mapping[str, str], *names: str) -> tuple[str, str]:
    """Variable and value; small letters that are set to nothing hide the capitals."""
    for name in names:
        for variable in (name, name.upper()):
            if variable in environ:
                if value := environ[variable].strip():
                    return variable, value
                break
    return "", ""


def _parse(value: str, variable: str) -> Proxy:
    url = value if "://" in value else f"http://{value}"
    scheme = url.partition("://")[0].lower()
    if scheme in _UNSUPPORTED:
        raise EnrolmentError(f"{variable}: {scheme}:// proxies are not supported; {_PROXY_FORM}")
    unreadable = EnrolmentError(f"{variable} cannot be read; {_PROXY_FORM}")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", _DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:  # its text may show a piece of a password
        raise unreadable from None
    is_more = parts.path not in ("", "/") or parts.query or parts.fragment
    if scheme != "http" or not _is_host(host) or port == 0 or is_more:
        raise unreadable
    user = parts.username
    credentials = None if user is None else (unquote(user), unquote(parts.password or ""))
    return Proxy(host=host, port=port, variable=variable, credentials=credentials)


def _is_host(text: str) -> bool:
    return bool(_HOST.fullmatch(text)) or _ip(text) is not None


def _is_loopback(host: str) -> bool:
    address = _ip(host)
    if address is None:
        return host == "localhost" or host.endswith(".localhost")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _is_excepted(host: str, port: str, exception: str, variable: str) -> bool:
    """Whether one entry means this host, itself or as a part of a domain or network."""
    address = _ip(host)
    if (network := _network(exception)) is not None:
        return address is not None and address in network
    found = _EXCEPTION.fullmatch(exception)
    if found is None:
        raise EnrolmentError(f"{variable} cannot be read at {exception!r}; {_EXCEPTION_FORM}")
    if found["port"] and found["port"] != port:
        return False
    name = found["host"].strip("[]").lower()
    if "*" in name:
        return fnmatchcase(host, name)
    if address is not None:
        return _ip(name) == address
    name = name.strip(".")
    return host == name or host.endswith(f".{name}")


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """An address is a network of one."""
    try:
        return ipaddress.ip_network(text.strip("[]"), strict=False)
    except ValueError:
        return None


def _ip(text: str) -> _Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
