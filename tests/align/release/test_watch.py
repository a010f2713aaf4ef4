"""`align watch` as a process, on run folders made by hand, in a browser."""

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from align.release import report
from align.release.watch_page import NotARun, WatchPage, gpus
from align.run_folder.artifacts import exclusive
from tests.align.release.test_report import HOSTILE, Page, clips, manifest, write_json, write_lines
from tests.chromium import chromium

ALIGN = str(Path(sys.executable).with_name("align"))


def summary(run, status="running", **stages):
    entries = {name.removeprefix("s"): {"status": state} for name, state in stages.items()}
    write_json(run / "summary.json", {"recipe": "demo", "status": status, "stages": entries, "seconds": 99})


def prompts(n, question="Which word is said?"):
    return [
        {
            "id": f"p{i}",
            "audios": [f"audio/clip_{i}.wav"],
            "question": f"{question} {i}",
            "answer_gt": "A woman says one.",
            "meta_info": "{}",
            "task_name": "word",
        }
        for i in range(n)
    ]


def train(run, steps, stage=".partial-6_dpo", **last):
    rows = [{"step": step, "loss": 3 / step, "peak_gb": 12.5} for step in range(10, steps + 1, 10)]
    write_lines(run / stage / "metrics.jsonl", [*rows[:-1], rows[-1] | last])
    eta = {"label": "6_dpo", "done": steps, "total": 300, "eta_s": 3725, "line": f"6_dpo  {steps}/300  ETA"}
    write_json(run / stage / "progress.json", eta)
    (run / stage / ".seconds").write_text("61.5")


def running(run, n=3):
    """A run in the middle of `6_dpo`, with hostile completions."""
    clips(run / "1_corpus")
    manifest(run, "1_corpus", "corpus", seconds=31.0)
    manifest(run, "3_sample", "sample", seconds=20.0, corpus="1_corpus")
    write_lines(run / "1_corpus/prompts.jsonl", prompts(n, HOSTILE))
    write_lines(run / "3_sample/prompts.jsonl", prompts(n, HOSTILE))
    drawn = [
        {"id": f"c{i}{k}", "prompt_id": f"p{i}", "index": k, "text": f"{HOSTILE} {k}", "policy": "ab"}
        for i in range(n)
        for k in range(2)
    ]
    write_lines(run / "3_sample/completions.jsonl", drawn)
    train(run, 30, **{"alarm/loss_spike": 9.5})
    summary(run, s1_corpus="done", s3_sample="done", s6_dpo="running", s7_evaluate="pending")
    return run


@contextmanager
def watching(run, *arguments):
    """The address of the page, until the block ends; then nothing of it is left."""
    command = [ALIGN, "watch", str(run), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address, line + process.stdout.read()
        yield address[0]
    finally:
        assert psutil.Process(process.pid).children(recursive=True) == []
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=30)
    assert (process.returncode, rest) == (0, "")
    with pytest.raises(httpx.ConnectError):
        httpx.get(address[0])


def until(page, is_so, within_s=30):
    """Wait; a function in the page would need a policy that allows `eval`."""
    for _ in range(10 * within_s):
        if is_so():
            return
        page.wait_for_timeout(100)
    raise AssertionError(page.inner_text("main"))


def files(run):
    return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_a_run_in_the_browser_from_its_middle_to_its_report(tmp_path):
    run = running(tmp_path / "demo")
    with ExitStack() as lock, watching(run) as url, chromium() as browser:
        lock.enter_context(exclusive(run))
        before = files(run)
        page = browser.new_page(viewport={"width": 1180, "height": 900})
        requests, trouble = [], []
        page.on("request", lambda request: requests.append((request.method, request.url)))
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        page.on("console", lambda message: trouble.append(f"{message.text} {message.location}"))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.goto(url)
        page.evaluate("window.mark = 'the same document'")
        text = page.inner_text("main")
        assert re.search(r"About 1 h 0[012] min left of this stage", text)
        assert "The loss is far above its recent values" in text
        assert "12.50 GB" in text
        rows = page.locator("[data-part=stages] tbody tr").all_inner_texts()
        assert [row.split("\t")[0].strip() for row in rows] == ["1_corpus", "3_sample", "6_dpo", "7_evaluate"]
        assert "30 of 300" in rows[2]
        assert "1 min 02 s" in rows[2]
        assert page.locator("[data-part=training] svg").count() == 1

        # What models say is text
        assert HOSTILE in page.inner_text("[data-part=samples]")
        assert page.locator("[data-part=samples] :is(script, img)").count() == 0
        assert page.locator(".card").count() == 3
        assert page.locator(".answer").count() == 6
        clip = page.locator("audio").first
        clip.evaluate("clip => clip.play()")
        until(page, lambda: clip.evaluate("clip => clip.currentTime") > 0.05)
        assert 0.4 < clip.evaluate("clip => clip.duration") < 0.7

        # It follows
        train(run, 40)
        until(page, lambda: "step 40" in page.inner_text("[data-part=training]"))
        assert page.evaluate("window.mark") == "the same document"
        assert "40 of 300" in page.inner_text("[data-part=stages]")
        assert files(run).keys() == before.keys()

        # And ends: as a run does, the report is the last thing that is written before the lock is let go
        (run / ".partial-6_dpo").rename(run / "6_dpo")
        manifest(run, "6_dpo", "dpo")
        summary(run, "done", s6_dpo="done")
        report.write(run)
        page.wait_for_timeout(3500)
        assert page.url == url
        lock.close()
        page.wait_for_url(f"{url}report.html")
        assert page.title() == "demo: run report"
        assert all(method == "GET" and address.startswith(url) for method, address in requests)
        assert trouble == []


def test_only_this_machine_reads_and_nothing_else_of_the_run(tmp_path):
    run = running(tmp_path / "demo")
    (run / "3_sample/quality.html").write_text("who judged how")
    with watching(run) as url:
        page = httpx.get(url)
        assert page.status_code == 200
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        policy = next(meta["content"] for meta in Page(page.text).named("meta") if "http-equiv" in meta)
        assert policy.startswith("default-src 'none'")
        assert httpx.get(url, headers={"host": "evil.example"}).status_code == 400
        assert httpx.get(url, headers={"host": "localhost:9999"}).status_code == 200
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            assert httpx.request(method, url).status_code == 405, method

        shown = re.findall(r"clips/(\w{64})\.mp3", page.text)
        assert len(shown) == 3
        for digest in shown:
            sound = httpx.get(f"{url}clips/{digest}.mp3")
            assert hashlib.sha256(sound.content).hexdigest() == digest
        assert httpx.get(f"{url}clips/{'0' * 64}.mp3").status_code == 404

        assert httpx.get(f"{url}3_sample/quality.html").text == "who judged how"
        for path in (
            *("summary.json", "report.html", "3_sample/completions.jsonl", ".partial-6_dpo/metrics.jsonl"),
            *("..%2f..%2fetc%2fpasswd", "clips/..%2f..%2fsummary.json", "3_sample%2fquality.html/x"),
        ):
            assert httpx.get(url + path).status_code == 404, path


def test_what_cannot_be_watched_is_said(tmp_path):
    def say(*arguments):
        done = subprocess.run([ALIGN, "watch", *map(str, arguments)], capture_output=True, text=True)
        return done.returncode, done.stderr

    code, message = say(tmp_path)
    assert code == 2
    assert f"{tmp_path} is not a run folder" in message
    code, message = say(tmp_path / "none")
    assert code == 2
    assert "does not exist" in message
    summary(tmp_path, s1_corpus="running")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, message = say(tmp_path, "--port", taken.getsockname()[1])
    assert code == 1
    assert "choose another --port" in message


def test_killed_it_leaves_nothing_and_starts_again_on_its_port(tmp_path):
    run = running(tmp_path / "demo")
    before = files(run)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [ALIGN, "watch", str(run), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert f"127.0.0.1:{port}/" in process.stdout.readline()
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        process.kill()
    with watching(run, "--port", str(port)) as url:
        assert httpx.get(url).status_code == 200
    assert files(run) == before


def text_of(run):
    return " ".join("".join(Page(WatchPage(run).render()).text).split())


def test_a_run_whose_process_is_gone_is_not_said_to_run(tmp_path):
    run = running(tmp_path / "demo")
    text = text_of(run)
    assert "The process that ran this is gone" in text
    assert "left of this stage" not in text
    assert "stopped" in text
    with exclusive(run):
        assert "left of this stage" in text_of(run)


def test_of_a_stage_that_is_made_again_the_new_work_is_shown(tmp_path):
    run = running(tmp_path / "demo")
    manifest(run, "6_dpo", "dpo", {"train_loss": 0.4}, 77.0)
    train(run, 290, "6_dpo")
    with exclusive(run):
        text = text_of(run)
    assert "step 30" in text
    assert "1 min 02 s" in text
    assert "1 min 17 s" not in text


def test_waiting_and_failure_say_for_what_and_why(tmp_path):
    write_json(
        tmp_path / "summary.json",
        {
            "status": "waiting",
            "stages": {"4_annotate": {"status": "waiting", "done": 3, "wanted": 10, "seconds": 4}},
        },
    )
    assert "3 of 10 judgements are there" in text_of(tmp_path)
    failed = {"2_sft": {"status": "failed", "error": f"2_sft: {HOSTILE}"}}
    write_json(tmp_path / "summary.json", {"status": "failed", "stages": failed})
    assert f"2_sft: {HOSTILE}" in text_of(tmp_path)
    assert Page(WatchPage(tmp_path).render()).named("img") == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stages": null}'])
def test_files_that_are_being_written_are_read_at_the_next_look(tmp_path, content):
    run = running(tmp_path / "demo")
    (run / ".partial-6_dpo/progress.json").write_text(content)
    (run / ".partial-6_dpo/.seconds").write_text("")
    with (run / ".partial-6_dpo/metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    (run / "summary.json").write_text(content)
    assert "step 30" in text_of(run)


def test_samples_of_a_stage_that_still_draws_are_those_of_its_newest_batch(tmp_path):
    clips(tmp_path / "0_corpus")
    manifest(tmp_path, "0_corpus", "corpus")
    write_lines(tmp_path / "0_corpus/prompts.jsonl", prompts(9))
    out = tmp_path / ".partial-3_sample"
    write_json(out / ".settings.json", {"kind": "sample", "config": {"corpus": "0_corpus"}})
    for second, (name, numbers) in enumerate({"00000004": (4, 8), "00000000": (0, 2)}.items()):
        batch = {n: [{"text": f"drawn {n}", "token_ids": [1], "logps": [0.0]}] for n in numbers}
        write_json(out / f"batches/prompts/{name}.json", batch)
        os.utime(out / f"batches/prompts/{name}.json", (second, second))
    summary(tmp_path, s0_corpus="done", s3_sample="running")
    html = WatchPage(tmp_path).render()
    assert re.findall(r"drawn \d", html) == ["drawn 0", "drawn 2"]
    assert re.findall(r'"question">([^<]*)', html) == ["Which word is said? 0", "Which word is said? 2"]
    assert len(Page(html).named("audio")) == 2
    (tmp_path / "0_corpus/audio/clip_2.wav").write_text("not audio")
    assert len(Page(WatchPage(tmp_path).render()).named("audio")) == 1
    (out / ".settings.json").unlink()
    assert "They cannot be shown" in WatchPage(tmp_path).render()


def test_clips_stay_while_a_browser_may_still_play_them_and_no_longer(tmp_path):
    run = running(tmp_path / "demo")
    page, digests = WatchPage(run), []
    for number in range(3):
        write_lines(run / "3_sample/prompts.jsonl", prompts(number + 1)[-1:])
        os.utime(run / "3_sample/completions.jsonl", (number, number))
        digests += re.findall(r"clips/(\w+)\.mp3", page.render())
    assert len(set(digests)) == 3
    assert [page.clip(digest) is not None for digest in digests] == [False, True, True]


def test_gpu_memory_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    """A stand-in prints what the command prints for this query; no GPU is needed."""
    command = tmp_path / "nvidia-smi"
    command.write_text(
        '#!/bin/sh\n[ "$2" = "--format=csv,noheader,nounits" ] || exit 3\n'
        'echo "NVIDIA H200, 61240, 143771, 97"\necho "NVIDIA H200, 4, 143771, 0"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpus() == [("NVIDIA H200", 61240.0, 143771.0, "97"), ("NVIDIA H200", 4.0, 143771.0, "0")]
    summary(tmp_path, s1_corpus="running")
    assert "59.80 GB" in WatchPage(tmp_path).render()
    command.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert gpus() == []


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(NotARun, match="align run RECIPE --out"):
        WatchPage(tmp_path)
