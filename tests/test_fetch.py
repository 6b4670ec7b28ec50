"""Pictures by address, from a server on this machine: what is fetched, and what is refused in one line."""

import base64
import io
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any

import pytest

from llava import fetch as fetching
from llava.constants import InputError
from llava.fetch import fetch, is_public
from llava.images import load_image
from tests.conftest import picture


def png() -> bytes:
    buffer = io.BytesIO()
    picture(30, 20).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by path; what was asked stands in `server.asked`."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        name = self.path.split("?")[0].strip("/")
        if name.startswith("hop"):
            count = int(name[3:])
            self.answer(302, location=f"/hop{count - 1}" if count else "/cat.png")
        elif name == "away":
            self.answer(302, location=self.path.partition("?")[2])
        elif name == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.02)
        elif name == "short":
            self.answer(200, b"half", length=8)
        elif name == "large":
            self.answer(200, bytes(5000))
        elif name.endswith(".png"):
            self.answer(200, png())
        else:
            self.answer(404, b"no")

    def answer(self, status: int, body: bytes = b"", length: int | None = None, location: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if location:
            self.send_header("Location", location)
        if length:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:  # a client that hangs up is part of the test
        pass


def serving(server: Server) -> Iterator[Server]:
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    yield from serving(Server(("127.0.0.1", 0), Handler))


@pytest.fixture
def url(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address; addresses of this machine are allowed."""
    monkeypatch.setenv("LLAVA_ALLOW_LOCAL_URLS", "1")
    return f"http://127.0.0.1:{server.server_address[1]}"


def complaint(address: str) -> str:
    with pytest.raises(InputError) as error:
        fetch(address)
    return str(error.value)


def test_a_picture_is_fetched(url, server):
    assert load_image(f"{url}/cat.png?size=full&x=ä").tobytes() == picture(30, 20).tobytes()
    path, headers = server.asked[0]
    assert path == "/cat.png?size=full&x=%C3%A4"
    assert headers["Host"] == url.removeprefix("http://")
    assert fetch(f"{url}/kätzchen mit hut.png") == fetch(url.replace("http", "HTTP") + "/%C3%A4.png") == png()
    assert server.asked[1][0] == "/k%C3%A4tzchen%20mit%20hut.png"


def test_redirects_are_followed_five_times(url, server):
    assert fetch(f"{url}/hop4") == png()
    assert len(server.asked) == 6
    assert "more than 5 times" in complaint(f"{url}/hop5")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nosuch", "404 Not Found"),
        ("short", "last 4 bytes are missing"),
        ("away?ftp://example.org/cat.png", "only http and https"),
        ("away?file:///etc/passwd", "only http and https"),
        ("away?http://me:secret@127.0.0.1/", "user name"),
    ],
)
def test_an_answer_that_is_no_picture(url, path, said):
    message = complaint(f"{url}/{path}")
    assert said in message
    assert repr(f"{url}/{path}") in message


def test_what_is_fetched_and_is_no_picture_is_named(url, monkeypatch):
    with pytest.raises(InputError, match=r"image at 'http://.*/large' is not a picture"):
        load_image(f"{url}/large")
    monkeypatch.setattr(fetching, "MAX_BYTES", 4096)
    assert "more than" in complaint(f"{url}/large")


def test_time_is_limited_however_slowly_it_comes(url, monkeypatch):
    monkeypatch.setattr(fetching, "TOTAL_SECONDS", 0.2)
    assert "no answer in time" in complaint(f"{url}/drip")


def test_a_server_that_says_nothing(monkeypatch):
    monkeypatch.setenv("LLAVA_ALLOW_LOCAL_URLS", "1")
    monkeypatch.setattr(fetching, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert "no answer in time" in complaint(address)
        assert "no answer in time" in complaint(address.replace("http", "https"))
    assert "refused" in complaint(address)


PRIVATE = [
    *["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"],
    *["224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::", "::1", "fe80::1", "fc00::1"],
    *["fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::7f00:1", "2002:7f00:1::", "2001:db8::1"],
    *["64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::808:808", "2001:0:7f00:1::"],
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_the_internets(address):
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_an_address_of_the_internet(address):
    assert is_public(ip_address(address))


SPELLINGS = [
    "127.0.0.1",
    "localhost",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "127.1",
    "0",
    "[::1]",
    "[::ffff:7f00:1]",
]


@pytest.mark.parametrize("allowed", [None, "", "0"])
@pytest.mark.parametrize("host", SPELLINGS)
def test_this_machine_is_refused_however_it_is_spelt(server, monkeypatch, host, allowed):
    monkeypatch.delenv("LLAVA_ALLOW_LOCAL_URLS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("LLAVA_ALLOW_LOCAL_URLS", allowed)
    message = complaint(f"http://{host}:{server.server_address[1]}/cat.png")
    assert "LLAVA_ALLOW_LOCAL_URLS=1" in message or "not known" in message or "not supported" in message
    assert server.asked == []


class Names:
    """A name server that changes its mind, and connections that come to nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
        self.answers, self.connected = list(answers), []
        monkeypatch.delenv("LLAVA_ALLOW_LOCAL_URLS", raising=False)
        monkeypatch.setattr(fetching, "getaddrinfo", self.look_up)
        monkeypatch.setattr(fetching, "create_connection", self.connect)

    def look_up(self, host: str, port: int, **kwargs: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, port)) for address in self.answers.pop(0)]

    def connect(self, address: Any, timeout: float) -> Any:
        self.connected.append(address)
        raise ConnectionRefusedError("refused")


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch):
    names = Names(monkeypatch, ["93.184.216.34"], ["127.0.0.1"])
    assert "refused" in complaint("https://rebind.example/cat.png")
    assert names.connected == [("93.184.216.34", 443)]
    assert len(names.answers) == 1


def test_every_address_of_a_host_is_tried(monkeypatch):
    names = Names(monkeypatch, ["2606:4700:4700::1111", "93.184.216.34"])
    assert "refused" in complaint("http://two.example:8080/cat.png")
    assert names.connected == [("2606:4700:4700::1111", 8080), ("93.184.216.34", 8080)]
    Names(monkeypatch, [])
    assert "has no address" in complaint("http://none.example/")


def test_one_local_address_among_others_is_refused(monkeypatch):
    names = Names(monkeypatch, ["93.184.216.34", "10.0.0.7"])
    assert "10.0.0.7" in complaint("http://mixed.example/cat.png")
    assert names.connected == []


def test_every_redirect_is_checked(url, server, monkeypatch):
    found, allowed = fetching.is_public, []

    def only_the_first(address: Any) -> bool:
        allowed.append(address)
        return len(allowed) == 1 or found(address)

    monkeypatch.delenv("LLAVA_ALLOW_LOCAL_URLS")
    monkeypatch.setattr(fetching, "is_public", only_the_first)
    assert "127.0.0.1" in complaint(f"{url}/away?{url}/cat.png")
    assert [path for path, _ in server.asked] == [f"/away?{url}/cat.png"]


@pytest.mark.parametrize(
    "address",
    [
        "ftp://example.org/cat.png",
        "file:///etc/passwd",
        "gopher://example.org/",
        "http://",
        "http://user@example.org/",
        "http://example.org:99999/",
        "http://[::1/",
        "http://exa mple.org/",
        "http://" + "a" * 300 + ".org/",
        "http://nosuch.invalid/",
        "http://nosuch.invalid/" + "x" * 5000,
        "://",
    ],
)
def test_an_address_that_cannot_be_fetched_is_one_short_line(address):
    with pytest.raises(InputError) as error:
        load_image(address)
    assert str(error.value).startswith("image at ")
    assert len(str(error.value)) < 400


def test_data_addresses_carry_their_picture():
    text = base64.b64encode(png()).decode()
    assert load_image(f"data:image/png;base64,{text}").tobytes() == picture(30, 20).tobytes()
    for wrong in (f"data:text/html;base64,{text}", f"data:image/png,{text}", "data:image/png;base64,x", "data:"):
        with pytest.raises(InputError, match="image at 'data:"):
            load_image(wrong)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_https_is_encrypted_and_its_certificate_checked(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    words = ["openssl", "req", *kind, *name, "-keyout", key, "-out", certificate]
    subprocess.run(words, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    secure = Server(("127.0.0.1", 0), Handler)
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    monkeypatch.setenv("LLAVA_ALLOW_LOCAL_URLS", "1")
    monkeypatch.setattr(fetching, "TOTAL_SECONDS", 5)
    for _ in serving(secure):
        address = f"https://localhost:{secure.server_address[1]}/cat.png"
        monkeypatch.setattr(fetching, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("127.0.0.1", 0))])
        assert "certificate" in complaint(address)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetch(address) == png()
        assert "certificate" in complaint(address.replace("localhost", "other.example"))
