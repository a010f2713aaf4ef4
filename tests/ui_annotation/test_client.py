"""What is said when there is no way to the server: the address, the next command, and never the key."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from ui_annotation import client


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(client.Unreachable, match=f"{url}.*align annotate up") as caught:
        client.connect(url, "the-key")
    assert "the-key" not in str(caught.value)


def test_a_wrong_key(argilla_server):
    with pytest.raises(client.Unreachable, match=f"{argilla_server.url}: wrong key") as caught:
        client.connect(argilla_server.url, "not-the-key")
    assert "not-the-key" not in str(caught.value)


@pytest.mark.parametrize("status", [404, 200])
def test_something_else_there(status):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_):
            pass

    other = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{other.server_port}"
    with pytest.raises(client.Unreachable, match=f"{url}: is not Argilla.*align annotate up"):
        client.connect(url, "key")
    other.shutdown()


def test_a_server_that_goes_away(argilla_server):
    owner = client.connect(argilla_server.url, argilla_server.api_key("owner"))
    owner.http_client.base_url = "http://127.0.0.1:9"
    with pytest.raises(client.Unreachable, match="align annotate up"):
        client.datasets(owner, "audio")


def test_a_refusal_names_the_request(argilla_server):
    annotator = client.connect(argilla_server.url, argilla_server.api_key("annotator-1"))
    with pytest.raises(client.Refused, match="GET /api/v1/users: 403"):
        client.request(annotator, "GET", "/api/v1/users")
