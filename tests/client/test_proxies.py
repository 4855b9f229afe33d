"""The decision table: what the environment says of the way to an address."""

import httpx
import pytest

from crafts_client.errors import EnrolmentError
from crafts_client.proxies import environment_with, proxy_for, way

FAR = "coordinator.example.org:9443"
NEAR = ("127.0.0.1", "localhost", "[::1]")


def asked(address: str = FAR, **environ: str) -> str:
    return way(proxy_for(address, environ))


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("proxy.hospital.org:3128", "proxy.hospital.org:3128"),
        ("http://proxy.hospital.org:3128", "proxy.hospital.org:3128"),
        (" HTTP://proxy.hospital.org:3128/ ", "proxy.hospital.org:3128"),
        ("http://proxy", "proxy:80"),
        ("10.7.0.1:8080", "10.7.0.1:8080"),
        ("[fd00::7]:8080", "[fd00::7]:8080"),
    ],
)
def test_a_proxy_is_read_as_curl_reads_it(value: str, address: str) -> None:
    assert asked(HTTPS_PROXY=value) == f"through proxy {address} (HTTPS_PROXY)"


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({"https_proxy": "p:1", "HTTPS_PROXY": "q:2", "ALL_PROXY": "r:3"}, "p:1 (https_proxy)"),
        ({"HTTPS_PROXY": "q:2", "all_proxy": "r:3"}, "q:2 (HTTPS_PROXY)"),
        ({"HTTPS_PROXY": "q:2", "https_proxy": "", "ALL_PROXY": "r:3"}, "r:3 (ALL_PROXY)"),
        ({"ALL_PROXY": "r:3"}, "r:3 (ALL_PROXY)"),
        ({"http_proxy": "s:4", "HTTP_PROXY": "s:4", "grpc_proxy": "t:5"}, "directly"),
        ({"HTTPS_PROXY": "q:2", "https_proxy": ""}, "directly"),
    ],
)
def test_which_variable_counts(environ: dict[str, str], variable: str) -> None:
    assert asked(**environ).removeprefix("through proxy ") == variable


@pytest.mark.parametrize("scheme", ["socks5", "SOCKS5H", "socks4", "https"])
def test_other_kinds_of_proxies_are_refused_by_their_name(scheme: str) -> None:
    with pytest.raises(EnrolmentError, match=f"all_proxy: {scheme.lower()}:// proxies are not"):
        proxy_for(FAR, {"all_proxy": f"{scheme}://proxy:1080"})


@pytest.mark.parametrize(
    "value",
    [
        *("http://proxy:port", "proxy:99999", "proxy:0", "http://:3128", ":3128", "http://"),
        *("ftp://proxy:21", "http://pro xy:3128", "http://a..b:3128", "[::1:3128", "p:1/wpad.dat"),
        *("http://user:hunter2#x@proxy:3128", "http://user:hunter2/x@proxy:3128"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_shows_no_password(value: str) -> None:
    with pytest.raises(EnrolmentError) as caught:
        proxy_for(FAR, {"HTTPS_PROXY": value})
    assert str(caught.value).startswith("HTTPS_PROXY cannot be read; expected http://HOST:PORT or")
    assert "hunter2" not in f"{caught.value}{caught.value.__cause__}"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("exceptions", "address", "is_direct"),
    [
        ("*", FAR, True),
        ("other.org,*", FAR, True),
        ("example.org", FAR, True),
        (".example.org", FAR, True),
        ("*.example.org", FAR, True),
        ("a.org b.org  EXAMPLE.org", FAR, True),
        ("example.org.", "coordinator.example.org.:9443", True),
        ("ample.org", FAR, False),
        (".coordinator.example.org", FAR, True),
        ("coordinator.example.org:9443", FAR, True),
        (".example.org:8443", FAR, False),
        ("10.0.0.0/8", "10.3.2.1:9443", True),
        ("10.*", "10.3.2.1:9443", True),
        ("10.3.2.1", "10.3.2.1:9443", True),
        ("10.3.2.1:9443,[fd00::1]", "10.3.2.1:9443", True),
        ("10.3.2.1:8443", "10.3.2.1:9443", False),
        ("2.1,10.3.2.0/28", "110.3.2.1:9443", False),
        ("10.0.0.0/8", FAR, False),
        ("fd00::/8", "[fd12::1]:9443", True),
        ("[fd12:0::1]:9443", "[fd12::1]:9443", True),
        ("fd12::2", "[fd12::1]:9443", False),
    ],
)
def test_what_is_reached_directly(exceptions: str, address: str, is_direct: bool) -> None:
    assert (asked(address, HTTPS_PROXY="p:1", NO_PROXY=exceptions) == "directly") is is_direct


def test_small_letters_hide_capitals_among_the_exceptions_too() -> None:
    assert asked(HTTPS_PROXY="p:1", NO_PROXY="*", no_proxy=".hospital.org") != "directly"


@pytest.mark.parametrize("entry", ["https://a.org", "a.org:port", "10.0.0.0/33", "[::1]:x", "a/b"])
def test_an_exception_that_cannot_be_read_is_named(entry: str) -> None:
    with pytest.raises(EnrolmentError, match=r"no_proxy cannot be read at '.*expected names"):
        proxy_for(FAR, {"HTTPS_PROXY": "p:1", "no_proxy": f"b.org,{entry}"})
    assert asked(no_proxy=entry) == "directly", "it does not matter without a proxy"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.8.8.8", "[::1]"]
)
def test_loopback_is_never_asked_of_a_proxy(host: str) -> None:
    for value in ("http://proxy:3128", "http://proxy:port", "socks5://proxy:1"):
        assert asked(f"{host}:1", https_proxy=value, ALL_PROXY=value, no_proxy="x") == "directly"


def test_credentials_reach_the_proxy_and_no_text() -> None:
    proxy = proxy_for(FAR, {"HTTPS_PROXY": "http://us%40er:p%23%2Fss@proxy:3128"})
    assert proxy is not None
    assert proxy.credentials == ("us@er", "p#/ss")
    assert proxy.headers == {"Proxy-Authorization": "Basic dXNAZXI6cCMvc3M="}
    assert httpx.Proxy(proxy.url).auth == ("us@er", "p#/ss")
    assert "ss" not in f"{proxy!r}{way(proxy)}"


@pytest.mark.parametrize(
    "environ",
    [
        {"https_proxy": "p:1", "no_proxy": "[::1],10.0.0.0/8,.hospital.org:8443"},
        {"HTTPS_PROXY": "u:s%40@p:1", "HTTP_PROXY": "http://proxy:port", "NO_PROXY": "*.a.org"},
        {"HTTPS_PROXY": "p:1", "all_proxy": "socks5://proxy:1", "No_Proxy": "*"},
        {"HTTPS_PROXY": "p:1", "NO_PROXY": ".example.org"},
        {"http_proxy": "p:1", "ALL_PROXY": "", "no_proxy": "[::1]"},
    ],
)
def test_another_program_finds_the_same_answer(environ: dict[str, str], monkeypatch) -> None:
    """httpx, as Flower's SuperNode has it, reads what we hand on; not what we read."""
    proxy = proxy_for(FAR, environ)
    handed_on = environment_with(proxy, environ | {"PATH": "/bin"})
    assert handed_on["PATH"] == "/bin"
    monkeypatch.setattr("os.environ", handed_on)
    with httpx.Client() as client:
        far = client._transport_for_url(httpx.URL(f"https://{FAR}"))
        near = [client._transport_for_url(httpx.URL(f"http://{h}:1")) for h in NEAR]
        assert (far is client._transport) is (proxy is None)
        assert all(each is client._transport for each in near)
