import http.server
import json
import queue
import threading
import uuid

import argilla as rg
import pytest


@pytest.fixture
def heard():
    """A web server for events: its address, and what it was sent."""
    events = queue.Queue()

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            events.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", events
    server.shutdown()
    server.server_close()


def test_a_webhook_still_gets_whole_events(argilla_server, heard):
    address, events = heard
    owner, annotator = argilla_server.client("owner"), argilla_server.client("annotator-1")
    client = rg.Argilla(api_url=argilla_server.url, api_key=argilla_server.api_key("owner"))
    settings = rg.Settings(
        fields=[rg.TextField("text")], questions=[rg.LabelQuestion("choice", labels=["a", "b"])]
    )
    dataset = rg.Dataset(
        f"events-{uuid.uuid4()}", workspace="audio", settings=settings, client=client
    ).create()
    wanted = {"url": address, "events": ["record.created", "response.created"], "description": "test"}
    webhook = owner.post("/api/v1/webhooks", json=wanted).raise_for_status().json()
    try:
        dataset.records.log([rg.Record(id="r0", fields={"text": "hello"}, metadata={})])
        created = events.get(timeout=30)
        record = created["data"]["id"]
        answer = {"values": {"choice": {"value": "a"}}, "status": "submitted"}
        annotator.post(f"/api/v1/records/{record}/responses", json=answer).raise_for_status()
        answered = events.get(timeout=30)
    finally:
        owner.delete(f"/api/v1/webhooks/{webhook['id']}").raise_for_status()
        dataset.delete()
    assert (created["type"], created["data"]["fields"]) == ("record.created", {"text": "hello"})
    assert created["data"]["dataset"]["name"] == dataset.name
    assert (answered["type"], answered["data"]["values"]) == ("response.created", {"choice": {"value": "a"}})
