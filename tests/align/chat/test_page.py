"""The page in a real browser: talk by voice, compare blind, vote, cut words out; hostile texts stay texts.

Screenshots are kept in test-artifacts/ at the top of the checkout.
"""

import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import soundfile
from playwright.sync_api import Page, expect

from align.recipe.recipe import load
from align.run_folder.artifacts import StageFolder
from align.stages import dpo, pairs
from preference_data import store
from preference_data.schema import AudioClip, Judgement, PreferencePair, Prompt
from tests.align.chat.stand_in import KEY, chatting
from tests.chromium import HOSTILE, chromium, until

ALIGN = str(Path(sys.executable).with_name("align"))
ARTIFACTS = Path(__file__).parents[3] / "test-artifacts"
QUESTION = "Is the tone high or low?"
MICROPHONE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


@pytest.fixture(scope="module")
def browser(tiny):
    with chromium(*MICROPHONE, f"--use-file-for-fake-audio-capture={tiny.audio / '3.wav'}") as chrome:
        yield chrome


@pytest.fixture
def page(browser):
    """A page that notes on itself the hosts that it asks, and what goes wrong."""
    new = browser.new_page(viewport={"width": 1200, "height": 1000}, accept_downloads=True)
    new.hosts, new.problems = set(), []
    new.on(
        "request", lambda request: new.hosts.add(re.sub(r"^(blob:)?http://([^/]*)/.*", r"\2", request.url))
    )
    new.on("console", lambda message: message.type == "error" and new.problems.append(message.text))
    new.on("pageerror", lambda error: new.problems.append(str(error)))
    new.on("dialog", lambda dialog: new.problems.append(dialog.message))
    yield new
    new.close()


@contextmanager
def chatted(*words):
    """The address that the command prints, and its process, until the block ends; then it has ended well."""
    command = [ALIGN, "chat", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        killer = threading.Timer(500, process.kill)
        killer.start()
        try:
            shown = ""
            while not shown.endswith(("loading ...\n", "\n\n")):
                shown += process.stdout.readline() or "\n\n"
            yield re.search(r"http://\S+", shown)[0], shown
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(30)
            killer.cancel()
    assert code == 0


@pytest.fixture(scope="module")
def run(toy, tiny, tmp_path_factory):
    """A run folder with a policy before and one after."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    for stage, policy in (("2_sft", toy), ("6_dpo", tiny.policy)):
        shutil.copytree(policy, folder / stage / "model")
        (folder / stage / "manifest.json").write_text('{"config": {}}')
    return folder


def opened(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator("#state")).to_have_text("ready", timeout=300_000)


def asked(page: Page, question: str, n_turns: int) -> None:
    """Ask, and wait until the last of so many turns can be judged."""
    page.fill("#question", question)
    page.click("#ask")
    expect(page.locator(".turn")).to_have_count(n_turns)
    expect(page.locator(".turn .vote:visible")).to_have_count(n_turns, timeout=60_000)


def kept(folder: Path) -> list[Judgement]:
    return store.read(folder / "judgements.jsonl", Judgement)


def test_two_policies_are_compared_blind_by_voice_and_a_vote_becomes_a_pair(run, tiny, page, tmp_path):
    with chatted(run / "2_sft", run / "6_dpo", "--annotator", "ann") as (url, shown):
        assert f"what you keep goes to {run / 'chat'}" in shown
        opened(page, url)
        assert KEY not in page.url
        assert "#" not in page.url
        page.locator("#sampling summary").click()
        page.fill("#max_tokens", "12")
        page.fill("#temperature", "0")

        page.click("#record")  # which ends by itself after what the policy hears, a second
        expect(page.locator("#composer .clip")).to_have_count(1)
        expect(page.locator("#record")).to_have_text("Record")
        asked(page, "", 1)
        answers = page.locator(".turn .answer")
        texts = answers.locator("p").all_text_contents()
        assert all(texts)
        assert len(set(texts)) == 2
        for name in ("2_sft", "6_dpo"):  # blind
            expect(answers.get_by_text(name)).to_have_count(0)
        assert not (run / "chat").exists()
        page.click("[data-choice=both_bad]")
        expect(answers.get_by_text("2_sft")).to_have_count(1)
        expect(page.locator(".after-vote")).to_contain_text("Not kept.")
        assert not (run / "chat").exists()  # nothing is kept unless somebody says so

        page.check("#keep")
        page.set_input_files("#files", [tiny.audio / "0.wav", tiny.audio / "1.wav"])
        expect(page.locator("#composer .clip")).to_have_count(2)
        asked(page, QUESTION, 2)
        last = page.locator(".turn").last
        expect(last.locator(".heard:visible")).to_contain_text("0 % of a clip")
        for play in last.get_by_text("Play", exact=True).all():
            play.click()
            until(lambda play=play: play.text_content() == "Play", "the clip has ended")
        expect(last.locator(".heard")).to_be_hidden()
        texts = last.locator(".answer p").all_text_contents()
        good = next(i for i, text in enumerate(texts) if text.startswith("The tone is"))
        last.locator(".answer").nth(good).get_by_text("Good", exact=True).click()
        last.locator(f"[data-choice={'ab'[good]}]").click()
        expect(last.locator(".after-vote")).to_contain_text("Kept.")
        expect(page.locator("#kept-list .kept")).to_have_count(1)
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTIFACTS / "chat_two.png", full_page=True)
        assert page.hosts == {re.search(r"//([^/]*)", url)[1]}, page.hosts
        assert page.problems == []

    (judgement,) = kept(run / "chat")
    assert list(judgement.texts) == texts
    assert judgement.factuality == judgement.behaviour
    assert judgement.factuality.ranks.index(1) == good
    assert judgement.thumbs[good] is True
    assert judgement.annotator == "ann"
    assert judgement.heard >= 0.8
    (prompt,) = store.read(run / "chat" / "prompts.jsonl", Prompt)
    assert (prompt.question, len(prompt.audios), len(prompt.history)) == (QUESTION, 3, 1)
    assert prompt.history[0].question == ""  # voice chat
    clips = store.read(run / "chat" / "clips.jsonl", AudioClip)
    lengths = {clip.path: round(clip.duration_s, 2) for clip in clips}
    assert [lengths[path] for path in prompt.audios[1:]] == [0.3, 0.5]
    _become_a_pair(run, judgement, good, tmp_path)


def _become_a_pair(run: Path, judgement: Judgement, good: int, folder: Path) -> None:
    """A recipe names the folder, and its pairs can be trained on."""
    chat, recipe = str(run / "chat"), folder / "recipe"
    recipe.mkdir()
    (recipe / "5_pairs.yaml").write_text(f"stage: pairs\ncompletions: {chat}\nannotations: {chat}\n")
    (recipe / "6_dpo.yaml").write_text(
        f"stage: dpo\npolicy: {run / '2_sft'}/\npairs: 5_pairs\ncorpus: {chat}\n"
        "epochs: 1\nbatch_size: 1\nlearning_rate: 1e-4\n"
    )
    first, second = load(recipe).steps
    out = StageFolder(folder, "5_pairs", "-")
    out.open()
    inputs = {chat: Path(chat), "5_pairs": out.path, str(run / "2_sft") + "/": run / "2_sft"}
    metrics = pairs.run(first.config, inputs, out)
    assert metrics["counted"] == 1
    built = store.read(out.path / "pairs.jsonl", PreferencePair)
    assert {pair.axis for pair in built} == {"factuality", "behaviour"}
    assert {(pair.chosen, pair.rejected) for pair in built} == {
        (judgement.texts[good], judgement.texts[1 - good])
    }
    dpo.check(second.config, inputs)


def test_texts_and_file_names_of_strangers_stay_texts(tiny, page, tmp_path):
    sound = (tiny.audio / "0.wav").read_bytes()
    with chatting(tiny.policy, tmp_path / "chat", "one", HOSTILE[0]) as url:
        opened(page, f"{url}/#{KEY}")
        page.check("#keep")
        files = [{"name": text, "mimeType": "audio/wav", "buffer": sound} for text in HOSTILE]
        page.set_input_files("#files", files)
        names = page.locator("#composer .clip-name")
        expect(names).to_have_count(len(HOSTILE))
        assert names.all_text_contents() == HOSTILE
        for remove in page.locator("#composer").get_by_text("Remove", exact=True).all()[:0:-1]:
            remove.click()
        for i, text in enumerate(HOSTILE):
            if i:
                page.click("#restart")
            asked(page, text, 1)
            assert page.locator(".turn .question").text_content() == text
            answers = page.locator(".turn .answer p").all_text_contents()
            assert sorted(answers) == sorted([text, f"1 {text}"])
            page.click("[data-choice=tie]")
            expect(page.locator("#kept-list .kept")).to_have_count(i + 1)
        page.screenshot(path=ARTIFACTS / "chat_hostile.png", full_page=True)
        page.reload()
        expect(page.locator("#kept-list .kept")).to_have_count(len(HOSTILE))
        shown = page.locator("#kept-list .kept > .question").all_text_contents()
        assert sorted(shown) == sorted(HOSTILE)
        assert page.evaluate("() => window.__ran") is None
        kinds = set(page.evaluate("() => [...document.querySelectorAll('*')].map((e) => e.localName)"))
        assert not {"img", "svg", "iframe", "object", "style", "base", "a", "b", "math", "audio"} & kinds
        assert page.hosts == {url.removeprefix("http://")}, page.hosts
        assert page.problems == []
        gone = shown[0]
        page.locator("#kept-list").get_by_text("Delete").first.click()
        expect(page.locator("#kept-list .kept")).to_have_count(len(HOSTILE) - 1)
    assert len(kept(tmp_path / "chat")) == len(HOSTILE) - 1
    assert gone not in {item.question for item in store.read(tmp_path / "chat" / "prompts.jsonl", Prompt)}


def test_an_answer_comes_word_by_word_is_stopped_and_asked_for_again(tiny, page, tmp_path):
    with chatting(tiny.policy, None, "one", pause_s=0.05) as url:
        opened(page, f"{url}/#{KEY}")
        expect(page.locator("#keep")).to_be_disabled()  # there is no run folder
        question = "Is the tone high or low? " * 8
        page.fill("#question", question)
        page.keyboard.press("Control+End")
        page.keyboard.press("Enter")
        answer = page.locator(".answer p")
        early = until(answer.text_content, "the first words")
        later = until(lambda: (t := answer.text_content()) != early and t, "more words")
        assert question.startswith(early)
        assert later.startswith(early)
        page.click("#stop")
        expect(page.locator(".who")).to_contain_text("stopped")
        assert 0 < len(answer.text_content()) < len(question)
        expect(page.locator(".vote")).to_contain_text("not whole")
        page.get_by_text("Ask again").click()
        expect(page.locator(".who")).to_contain_text("tokens", timeout=60_000)
        assert answer.text_content() == question.strip()
        assert page.problems == []


def test_words_stand_on_the_waveform_and_a_range_of_them_is_cut_out(tiny, page, tmp_path):
    with chatting(tiny.policy, None, "one") as url:
        opened(page, f"{url}/#{KEY}")
        page.set_input_files("#files", tiny.audio / "3.wav")  # 0.9 s
        page.get_by_text("Words", exact=True).click()
        words = page.locator(".word")
        expect(words).to_have_text(["the", "tone", "is", "high"])
        wave, tone = page.locator(".wave").bounding_box(), words.nth(1).bounding_box()
        for place, time_s in ((tone["x"], 0.2), (tone["x"] + tone["width"], 0.45)):
            assert (place - wave["x"]) / wave["width"] == pytest.approx(time_s / 0.9, abs=0.01)
        words.nth(1).click()
        words.nth(2).click(modifiers=["Shift"])
        expect(page.locator(".range")).to_contain_text("0.20 to 0.72 s")
        page.screenshot(path=ARTIFACTS / "chat_words.png", full_page=True)
        with page.expect_download() as download:
            page.get_by_text("Save as WAV").click()
        assert download.value.suggested_filename == "3 0.20-0.72.wav"
        cut, rate = soundfile.read(download.value.path())
        assert len(cut) / rate == pytest.approx(0.52, abs=0.001)
        page.get_by_text("Use as a clip").click()
        expect(page.locator("#composer .clip")).to_have_count(2)
        expect(page.locator("#composer .clip").last).to_contain_text("0.52 s")
        page.set_input_files("#files", {"name": "x.wav", "mimeType": "audio/wav", "buffer": b"no audio"})
        page.fill("#question", "low")
        page.click("#ask")
        expect(page.locator("#problem")).to_contain_text("messages[0].content[2]: the clip is refused")
        expect(page.locator("#composer .clip")).to_have_count(3)  # it is all here again
        expect(page.locator("#question")).to_have_value("low")
        page.locator("#composer .clip").last.get_by_text("Remove").click()
        asked(page, "low", 1)
        assert "400" in page.problems.pop()  # the browser's note on the refusal
        assert page.problems == []
