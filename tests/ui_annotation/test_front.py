"""What stands before Argilla: the cookie for its <audio> elements, headers, a limit on guessing, a script."""

import hashlib
import io
import secrets
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from tests.chromium import chromium

RATE_HZ, SECONDS = 16_000, 3


def tone() -> bytes:
    samples = 0.1 * np.sin(np.arange(RATE_HZ * SECONDS) * 0.1)
    file = io.BytesIO()
    soundfile.write(file, samples, RATE_HZ, format="WAV")
    return file.getvalue()


@pytest.fixture(scope="module")
def clip(argilla_server: Any) -> str:
    content = tone()
    address = f"/media/audio/{hashlib.sha256(content).hexdigest()}.wav"
    argilla_server.owner.put(address, content=content).raise_for_status()
    return address


@pytest.fixture(scope="module")
def token(argilla_server: Any) -> str:
    form = {"username": "annotator-1", "password": argilla_server.password("annotator-1")}
    answer = httpx.post(f"{argilla_server.url}/api/v1/token", data=form)
    return answer.raise_for_status().json()["access_token"]


def me(server: Any, token: str, **headers: str) -> httpx.Response:
    return httpx.get(f"{server.url}/api/v1/me", headers={"Authorization": f"Bearer {token}", **headers})


# --- the cookie


def test_who_asks_for_me_by_token_gets_a_cookie_for_media(argilla_server: Any, token: str, clip: str) -> None:
    cookie = me(argilla_server, token).headers["set-cookie"]
    value, *attributes = cookie.split("; ")
    assert value == f"argilla_media={token}"
    assert {"Path=/media", "HttpOnly", "SameSite=Strict"} <= set(attributes)
    assert "Secure" not in attributes
    lifetime = next(int(one.removeprefix("Max-Age=")) for one in attributes if one.startswith("Max-Age="))
    assert 86_000 < lifetime <= 86_400  # as long as the token, a day
    assert httpx.get(argilla_server.url + clip, headers={"Cookie": value}).status_code == 200
    # only for media: Argilla's own API takes no cookie, so no other site can use it there
    assert httpx.get(f"{argilla_server.url}/api/v1/me", headers={"Cookie": value}).status_code == 401


def test_without_a_proxy_the_forwarded_headers_are_ignored(argilla_server: Any, token: str) -> None:
    assert "Secure" not in me(argilla_server, token, **{"X-Forwarded-Proto": "https"}).headers["set-cookie"]


def test_an_api_key_or_a_wrong_token_gets_no_cookie(argilla_server: Any) -> None:
    assert "set-cookie" not in argilla_server.annotator.get("/api/v1/me").headers
    assert "set-cookie" not in me(argilla_server, "not.a.token").headers


def test_another_site_cannot_write_with_the_cookie(argilla_server: Any, token: str, clip: str) -> None:
    def report(**headers: str) -> int:
        cookie = {"Cookie": f"argilla_media={token}"}
        address = f"{argilla_server.url}{clip}/heard"
        return httpx.post(address, params={"share": 0.1}, headers={**cookie, **headers}).status_code

    assert report(**{"Sec-Fetch-Site": "same-origin"}) == 204
    assert report(Origin=argilla_server.url) == 204
    assert report(**{"Sec-Fetch-Site": "cross-site"}) == 403
    assert report(**{"Sec-Fetch-Site": "same-site", "Origin": argilla_server.url}) == 403
    assert report(Origin="https://elsewhere.example") == 403
    assert report(Origin="null") == 403
    assert report() == 403


def test_signing_out_takes_the_cookie_back(argilla_server: Any, token: str) -> None:
    headers = {"Cookie": f"argilla_media={token}", "Sec-Fetch-Site": "same-origin"}
    answer = httpx.post(f"{argilla_server.url}/media/sign-out", headers=headers)
    assert answer.status_code == 204
    assert answer.headers["set-cookie"].startswith("argilla_media=; Path=/media; ")
    assert "Max-Age=0" in answer.headers["set-cookie"]


# --- headers


@pytest.mark.parametrize("path", ["/", "/sign-in", "/no/such/page", "/media/listening.js", "/api/v1/version"])
def test_every_answer_keeps_other_sites_out(argilla_server: Any, path: str) -> None:
    headers = httpx.get(argilla_server.url + path, headers={"Origin": "https://elsewhere.example"}).headers
    assert not [name for name in headers if name.startswith("access-control-")]
    assert headers["x-frame-options"] == "SAMEORIGIN"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["frame-ancestors"] in ("'self'", "'none'")
    assert policy["default-src"] in ("'self'", "'none'")
    assert "unsafe" not in policy.get("script-src", "")


def test_another_origin_is_not_allowed_by_preflight(argilla_server: Any) -> None:
    asked = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "GET"}
    answer = httpx.options(f"{argilla_server.url}/api/v1/me", headers=asked)
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_every_page_loads_our_scripts_whatever_encoding_it_has(argilla_server: Any) -> None:
    for path in ("/", "/sign-in", f"/dataset/{secrets.token_hex(4)}/annotation-mode"):
        for encoding in ("identity", "gzip"):
            page = httpx.get(argilla_server.url + path, headers={"Accept-Encoding": encoding})
            for script in ("listening.js", "keys.js"):
                assert page.text.count(f'<script src="/media/{script}" defer></script>') == 1


def test_a_long_range_header_costs_nothing(argilla_server: Any) -> None:
    many = "bytes=" + ",".join(f"{i}-{i}" for i in range(0, 20_000, 2))
    began = time.monotonic()
    assert httpx.get(f"{argilla_server.url}/favicon.ico", headers={"Range": many}).status_code == 200
    assert time.monotonic() - began < 2


# --- guessing


def at(server: Any, address: str) -> httpx.Client:
    """A client whose connections come from an address of its own."""
    return httpx.Client(base_url=server.url, timeout=60, transport=httpx.HTTPTransport(local_address=address))


def attempt(client: httpx.Client, name: str, password: str, **headers: str) -> httpx.Response:
    form = {"username": name, "password": password}
    return client.post("/api/v1/token", data=form, headers=headers)


def test_wrong_passwords_are_limited_where_they_come_from_and_nowhere_else(argilla_server: Any) -> None:
    victim, colleague = argilla_server.add_user(), argilla_server.add_user()
    victims, colleagues = argilla_server.password(victim), argilla_server.password(colleague)
    attacker, office, elsewhere = (at(argilla_server, f"127.0.1.{i}") for i in (1, 1, 2))
    assert attempt(office, colleague, "wrong").status_code == 401
    assert attempt(office, colleague, colleagues).status_code == 201  # what was wrong is forgiven

    def guess(number: int, name: str) -> tuple[float, Any]:
        claimed = f"203.0.113.{number}"  # no proxy is configured, so no header makes it another address
        headers = {
            "X-Forwarded-For": claimed,
            "X-Real-IP": claimed,
            "Forwarded": f"for={claimed}",
            "True-Client-IP": claimed,
        }
        began = time.monotonic()
        answer = attempt(attacker, name, "wrong", **headers)
        return time.monotonic() - began, (answer.status_code, answer.text, tuple(answer.headers))

    there = [guess(i, victim) for i in range(10)]
    refused = attempt(attacker, victim, victims)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    # the same form spelled in other ways is the same form
    form_type = {"Content-Type": "application/x-www-form-urlencoded"}
    odd = attacker.post(
        "/api/v1/token", content=f"username=x;username={victim};password=p", headers=form_type
    )
    assert odd.status_code in (422, 429)
    parts = {"username": (None, victim), "password": (None, "p")}
    assert attacker.post("/api/v1/token", files=parts).status_code == 429
    assert attempt(elsewhere, victim, victims).status_code == 201
    assert attempt(at(argilla_server, "127.0.1.1"), colleague, colleagues).status_code == 201

    missing = [guess(i, f"nobody-{i}") for i in range(10)]  # another account each time
    assert {said for _, said in there + missing} == {there[0][1]}
    # a password was hashed all the same: without, it would be a tenth of the time
    assert min(took for took, _ in missing) > min(took for took, _ in there) / 3
    refused = attempt(attacker, "annotator-1", argilla_server.password("annotator-1"))
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    time.sleep(1)
    guess(20, "nobody")  # one more, then the wait is twice as long
    assert attempt(attacker, "nobody", "wrong").headers["retry-after"] == "2"
    assert attempt(office, colleague, colleagues).status_code == 201  # from a browser that is known
    assert attempt(office, victim, victims).status_code == 429  # as theirs, not as anybody's
    assert attempt(elsewhere, victim, victims).status_code == 201


def test_a_cookie_that_makes_a_browser_known_signs_nobody_in(argilla_server: Any, clip: str) -> None:
    client = at(argilla_server, "127.0.1.3")
    cookie = attempt(client, "annotator-1", argilla_server.password("annotator-1")).headers["set-cookie"]
    value, *attributes = cookie.split("; ")
    assert {"Path=/api/v1/token", "HttpOnly", "SameSite=Strict"} <= set(attributes)
    token = value.removeprefix("argilla_browser=")
    url = argilla_server.url
    for headers in ({"Authorization": f"Bearer {token}"}, {"Cookie": f"argilla_media={token}"}):
        assert httpx.get(url + clip, headers=headers).status_code == 401
        assert httpx.get(f"{url}/api/v1/me", headers=headers).status_code == 401


def test_a_sign_in_of_megabytes_is_not_read(argilla_server: Any) -> None:
    form = {"username": "owner", "password": "p" * 50_000}
    assert httpx.post(f"{argilla_server.url}/api/v1/token", data=form).status_code == 413


# --- in a browser


@pytest.fixture
def page() -> Iterator[Any]:
    with chromium() as browser:
        yield browser.new_page()


def dataset(server: Any, fields: dict[str, str], *, markdown: bool) -> str:
    """A published dataset of one record with these text fields; gives its id."""
    owner = server.owner
    spaces = owner.get("/api/v1/me/workspaces").json()["items"]
    space = next(one["id"] for one in spaces if one["name"] == "audio")

    def post(path: str, content: dict[str, Any]) -> dict[str, Any]:
        return owner.post(f"/api/v1/{path}", json=content).raise_for_status().json()

    made = post("datasets", {"name": f"front-{secrets.token_hex(4)}", "workspace_id": space})
    base = f"datasets/{made['id']}"
    for name in fields:
        kind = {"type": "text", "use_markdown": markdown}
        post(f"{base}/fields", {"name": name, "title": name, "required": True, "settings": kind})
    options = [{"value": one, "text": one, "description": None} for one in ("yes", "no")]
    question = {"name": "q", "title": "q", "required": True}
    post(f"{base}/questions", {**question, "settings": {"type": "label_selection", "options": options}})
    owner.put(f"/api/v1/{base}/publish").raise_for_status()
    post(f"{base}/records/bulk", {"items": [{"fields": fields}]})
    return made["id"]


def sign_in(page: Any, server: Any, who: str = "annotator-1") -> None:
    page.goto(f"{server.url}/sign-in")
    page.locator("input[type=text]").fill(who)
    page.locator("input[type=password]").fill(server.password(who))
    page.keyboard.press("Enter")
    page.wait_for_url(f"{server.url}/")


def test_playing_in_the_ui_is_reported_and_signing_out_ends_the_cookie(
    page: Any, argilla_server: Any, clip: str
) -> None:
    console: list[str] = []
    page.on("console", lambda message: message.type == "error" and console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    player = f'<audio controls preload="metadata" src="{clip}"></audio>'
    record = dataset(argilla_server, {"audio": player}, markdown=True)
    sign_in(page, argilla_server)
    page.goto(f"{argilla_server.url}/dataset/{record}/annotation-mode")
    page.wait_for_selector("audio")

    with page.expect_response(lambda answer: "/heard?from=" in answer.url) as first:
        page.evaluate("document.querySelector('audio').play()")
        page.wait_for_timeout(1_000)
        page.evaluate("document.querySelector('audio').pause()")
    assert first.value.status == 204
    early = share(argilla_server, clip)
    assert 0.1 < early < 0.9  # about one of three seconds
    with page.expect_response(lambda answer: "/heard?from=" in answer.url):
        # thrown away while it plays, as the UI does between records: told all the same
        page.evaluate(
            "async () => { const a = document.querySelector('audio'); await a.play(); window.a = a }"
        )
        page.wait_for_timeout(1_000)
        page.evaluate("window.a.remove()")
    page.wait_for_timeout(300)
    assert share(argilla_server, clip) > early
    page.reload()  # the page forgets what was played, the server does not
    page.wait_for_selector("audio")
    with page.expect_response(lambda answer: "/heard?from=" in answer.url and "from=0&" not in answer.url):
        page.evaluate(
            "async () => { const a = document.querySelector('audio');"
            " if (a.readyState < 1) await new Promise(done => a.onloadedmetadata = done);"
            " a.currentTime = 0.8; await a.play(); a.playbackRate = 9;"
            " await new Promise(done => a.onended = done); window.rate = a.playbackRate }"
        )
    assert page.evaluate("window.rate") == 2  # the page lets nobody listen faster
    page.wait_for_timeout(300)
    assert share(argilla_server, clip) == pytest.approx(1, abs=0.02)
    assert "argilla_media" in [one["name"] for one in page.context.cookies()]
    with page.expect_response(lambda answer: answer.url.endswith("/media/sign-out")):
        page.locator(".user__button").click()
        page.get_by_text("Log out").click()
    assert "argilla_media" not in [one["name"] for one in page.context.cookies()]

    # the next person at this browser is sent the clip, too, though the browser has it
    sign_in(page, argilla_server, "annotator-2")
    page.goto(f"{argilla_server.url}/dataset/{record}/annotation-mode")
    page.wait_for_selector("audio")
    assert share(argilla_server, clip, "annotator-2") == 0
    with page.expect_response(lambda answer: "/heard?from=" in answer.url):
        page.evaluate(
            "async () => { const a = document.querySelector('audio'); await a.play();"
            " await new Promise(resolve => a.onended = resolve) }"
        )
    page.wait_for_timeout(300)
    assert share(argilla_server, clip, "annotator-2") == pytest.approx(1, abs=0.02)
    assert console == []


def share(server: Any, clip: str, who: str = "annotator-1") -> float:
    rows = server.owner.get("/media/audio/heard").json()["heard"]
    mine = [row["share"] for row in rows if row["annotator"] == who and row["clip"] in clip]
    return max(mine, default=0.0)


def test_a_script_in_an_answer_does_not_run_even_where_argilla_renders_it(
    page: Any, argilla_server: Any
) -> None:
    ran = "top.document.title='ran'"
    hostile = f'<img src=x onerror="{ran}"><svg onload="{ran}"></svg><script>{ran}</script>'
    record = dataset(argilla_server, {"answer": hostile}, markdown=False)  # a field as we never make them
    sign_in(page, argilla_server)
    with page.expect_console_message(lambda message: "inline event handler violates" in message.text):
        page.goto(f"{argilla_server.url}/dataset/{record}/annotation-mode")
    page.wait_for_timeout(500)
    assert page.title() == "Argilla"
