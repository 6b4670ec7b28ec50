"""Pictures by address: one careful GET, of the standard library alone.

Whoever lets others name addresses must not let them reach into its own network. The host is looked up once, what it
resolves to is checked, and the connection goes to that very address, so that a second answer of its name server changes
nothing; the same holds for every redirect. Proxies are not used, as they would look the host up anew.
"""

import ssl
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from socket import IPPROTO_TCP, SHUT_RDWR, SOCK_STREAM, create_connection, getaddrinfo, socket
from threading import Event, Timer
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from llava import env
from llava.constants import InputError

CONNECT_SECONDS, TOTAL_SECONDS = 10.0, 30.0
MAX_BYTES, MAX_REDIRECTS = 64 * 2**20, 5
UNICAST, NAT64 = IPv6Network("2000::/3"), IPv6Network("64:ff9b::/96")  # RFC 4291 and 6052
LEGIBLE = 120


def fetch(url: str) -> bytes:
    """Return what an http or https address holds, or a `data:image/…;base64,…` one.

    At most 64 MiB are read, and 5 redirects followed; each request may take 30 seconds.

    Raises:
        InputError: another scheme, a user name, an address of this machine or its network (unless the environment says
            LLAVA_ALLOW_LOCAL_URLS=1), no connection, an answer other than 200, too large, too slow, or redirected too
            often.
    """
    place = url
    try:
        if url.startswith("data:"):
            return _inline(url)
        for _ in range(MAX_REDIRECTS + 1):
            content, target = _get(place)
            if target is None:
                return content
            place = urljoin(place, target)
        raise InputError(f"it is redirected more than {MAX_REDIRECTS} times; give the address of the picture itself")
    except TimeoutError:
        problem = "there is no answer in time; download it and give the file"
    except (OSError, HTTPException, ValueError) as error:  # InputError is a ValueError too
        problem = str(error) or type(error).__name__
    raise InputError(f"image at {shortened(url)} cannot be fetched: {problem}")


def shortened(address: str) -> str:
    """Quote an address for a message, cut where it is very long."""
    return repr(address if len(address) <= LEGIBLE else address[: LEGIBLE - 1] + "…")


def _inline(url: str) -> bytes:
    head, _, text = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise InputError("of data: addresses only data:image/…;base64, are read")
    return b64decode(text)


def _get(url: str) -> tuple[bytes, str | None]:
    """Return the body at an address, or where it says that the body is."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise InputError(f"only http and https are, got {parts.scheme or url!r}; download it and give the file")
    if not parts.hostname:
        raise InputError("it names no host; check the address")
    if parts.username is not None:
        raise InputError("it carries a user name or password; download it and give the file")
    host = parts.hostname.encode("idna").decode("ascii") if not parts.hostname.isascii() else parts.hostname
    port = parts.port or (443 if parts.scheme == "https" else 80)
    secure = parts.scheme == "https"
    with _connect(host, port) as plain, _within(TOTAL_SECONDS) as clock:
        connection = (HTTPSConnection if secure else HTTPConnection)(host, port)
        with _encrypted(plain, host) if secure else plain as connection.sock:
            clock.watched = connection.sock
            if isinstance(connection.sock, ssl.SSLSocket):
                connection.sock.do_handshake()
            connection.request("GET", _path(parts), headers={"User-Agent": "globalcom2", "Accept": "image/*"})
            with connection.getresponse() as response:
                return _answer(response, clock)


def _connect(host: str, port: int) -> socket:
    """Look a host up once and connect to the first of its addresses that answers, if all of them are the internet's."""
    found = [str(info[4][0]) for info in getaddrinfo(host, port, type=SOCK_STREAM, proto=IPPROTO_TCP)]
    local = [address for address in found if not is_public(ip_address(address))]
    if local and env.read(env.LOCAL_URLS) != "1":
        raise InputError(
            f"{host!r} is {local[0]}, an address of this machine, a private network or a special purpose; "
            f"set {env.LOCAL_URLS}=1 if such are to be fetched from"
        )
    for number, address in enumerate(found, 1):
        try:
            return create_connection((address, port), CONNECT_SECONDS)
        except OSError:
            if number == len(found):
                raise
    raise InputError(f"{host!r} has no address; check it")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Tell whether an address is one of the internet's; a translated one (NAT64) is if the IPv4 address in it is."""
    if isinstance(address, IPv6Address):
        if address in NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in UNICAST or address.sixtofour or address.teredo:  # nowhere, or to IPv4
            return False
    return address.is_global and not address.is_multicast


def _encrypted(plain: socket, host: str) -> ssl.SSLSocket:
    context = ssl.create_default_context()
    return context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)


def _path(parts: SplitResult) -> str:
    """Return the path and query of an address as they are sent, letters beyond ASCII escaped."""
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    return path + ("?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?[]") if parts.query else "")


def _answer(response: HTTPResponse, clock: "_Clock") -> tuple[bytes, str | None]:
    """Read an answer to its end, or to where it is too much."""
    if response.status in (301, 302, 303, 307, 308) and (target := response.getheader("Location")):
        return b"", target
    if response.status != 200:
        raise InputError(f"the server says {response.status} {response.reason}; check the address")
    content = response.read(MAX_BYTES + 1)
    if clock.over.is_set():
        raise TimeoutError
    if len(content) <= MAX_BYTES and response.length:  # of what was announced
        raise InputError(f"the last {response.length} bytes are missing; try again")
    if len(content) > MAX_BYTES:
        raise InputError(f"it has more than {MAX_BYTES >> 20} MiB; give a smaller picture")
    return content, None


class _Clock:
    """Cuts a connection when its time is over, however slowly something keeps coming."""

    def __init__(self) -> None:
        self.over = Event()
        self.watched: socket | None = None

    def end(self) -> None:
        self.over.set()
        with suppress(OSError):  # closed already
            if self.watched is not None:
                socket.shutdown(self.watched, SHUT_RDWR)  # not SSLSocket's own, which a reader would stumble over


@contextmanager
def _within(seconds: float) -> Iterator[_Clock]:
    """Let what is watched in a block end after some seconds, with a TimeoutError."""
    clock = _Clock()
    timer = Timer(seconds, clock.end)
    timer.daemon = True
    timer.start()
    try:
        yield clock
    except (OSError, HTTPException) as error:
        if clock.over.is_set():  # whatever the cut connection was taken for
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
