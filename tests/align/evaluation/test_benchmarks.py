"""The reports' benchmarks: error rates, BLEU, accuracy and time stamps, by worked numbers."""

import json
import math
from importlib.util import find_spec
from typing import get_args

import numpy as np
import pytest
import sacrebleu
import soundfile

from align.evaluation.benchmarks import published, srwt, wer
from align.evaluation.benchmarks.rows import BadBenchmark, Utterance, read_utterances
from align.evaluation.benchmarks.tasks import (
    CannotScore,
    Kind,
    compare,
    open_rows,
    prompt_of,
    read_answers,
    score,
)


def rows(*pairs, source="s"):
    return [Utterance("a.wav", "p", gt, source) for gt, _ in pairs], [text for _, text in pairs]


def test_english_words_are_compared_after_whispers_normalisation():
    # Titles, contractions, numerals and punctuation cost nothing; numbers in a row become one word.
    assert (
        wer.tokens("<|en|>Mr. Smith won't pay, twenty dollars!", "en")
        == "mister smith will not pay 20".split()
    )
    pairs = [
        ("<|en|>Mr. Smith won't pay twenty!", "mister smith will not pay 20"),
        ("red green blue grey", "red green blew"),
    ]
    found = score("asr_en", *rows(*pairs))["s"]
    assert (found["errors"], found["length"]) == (2, 10)  # blue -> blew, grey is missing
    assert found["wer"] == 0.2
    assert (found["unit"], found["n"]) == ("word", 2)


def test_british_spellings_are_american_ones():
    assert score("asr_en", *rows(("the colour of the theatre", "the color of the theater")))["s"]["wer"] == 0
    assert wer.not_reproduced("en") == []


def test_references_of_which_nothing_is_left_have_no_rate_no_hit_and_no_interval_but_the_reason():
    given, _ = rows(("[laughter]", ""), ("[cough]", ""))
    found = score("recognition", given, ["[cough]", "hm"])["s"]
    assert found["warning"].startswith("1 of 2 rows have no word error")  # [laughter] beside [cough]
    assert (found["exact"], found["wer"], found["n"]) == (0.0, None, 2)
    differences = compare("recognition", given, ["[cough]", "hm"], ["a", "b"])["s"]
    assert "no word is left" in differences["wer"]["reason"]
    assert differences["exact"]["delta"] == 0
    english = compare("asr_en", rows(("Hmm.", ""))[0], ["hm"], ["Hmm."])["s"]
    assert english == {"wer": {"reason": "no word is left of the references after normalisation"}}


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(
    "reference", ["", "Hmm.", "...", "Uh, um", "[laughter]", "（笑）", "<|en|>", "\u3000", "😀"]
)
def test_no_reference_is_too_empty_for_any_kind(kind, reference):
    given, _ = rows((reference, ""), source="covost2_en_de_test")
    for text in ("", "two words", reference):
        numbers = score(kind, given, [text])["covost2_en_de_test"]
        assert numbers["n"] == 1
        assert all(
            value is None or math.isfinite(value) for value in map(numbers.get, ("wer", "bleu", "cer"))
        )
        for row in compare(kind, given, [text], ["word"]).get("covost2_en_de_test", {}).values():
            assert "reason" in row or row["n"] == 1


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("कि", "का"),
        ("दिल्ली की", "दिल्ला की"),
        ("ที่", "ที้"),
        ("كَتَبَ", "كُتِبَ"),
        ("naïve नि", "naïve ना"),
        ("yes 😀", "yes 😡"),
        ("yes ❤️", "yes"),
        ("[laughter] yes", "[cough] yes"),
        ("(laughs) hi", "hi"),
        ("<unk> hi", "<noise> hi"),
        ("C++", "C"),
        ("50% off", "50 off"),
        ("$5", "5"),
    ],
)
def test_what_a_normaliser_removes_is_no_exact_hit_and_comes_with_a_warning(reference, text):
    given, same = rows((reference, reference), ("plain", "plain"))
    found = score("recognition", given, [text, "Plain!"])["s"]
    assert found["exact"] == 0.5
    assert "1 of 2 rows have no word error" in found["warning"] or found["wer"] > 0
    assert "warning" in score("asr_other", given, [text, "plain"])["s"] or found["wer"] > 0
    right = score("recognition", given, same)["s"]
    assert (right["exact"], "warning" in right) == (1.0, False)


def test_answers_of_other_tools_are_read_line_by_line_and_with_a_byte_order_mark(tmp_path):
    row = {"gt": "g", "response": "a \u2028 b", "source": "s"}
    line = json.dumps(row, ensure_ascii=False)
    for text in (f"\ufeff{line}\n\n{line}\n", f"\ufeff[{line},\n{line}]", f"{line}\r\n{line}"):
        (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
        utterances, texts, _ = read_answers(tmp_path / "a.jsonl", "asr_en")
        assert texts == ["a \u2028 b"] * 2
        assert utterances[0] == Utterance("", "", "g", "s")


def test_errors_are_summed_over_the_corpus_not_averaged_over_rows():
    found = score(
        "asr_other", *rows(("un deux", "un deux trois quatre"), ("a b c d e f g h", "a b c d e f g h"))
    )
    assert found["s"]["wer"] == 2 / 10


@pytest.mark.parametrize(
    ("kind", "unit"), [("asr_zh", "character"), ("asr_yue", "character"), ("asr_other", "word")]
)
def test_chinese_and_cantonese_are_compared_by_character(kind, unit):
    found = score(kind, *rows(("<|zh|>今天 天气，很好。", "今天天汽很好")))["s"]
    assert found["unit"] == unit
    if unit == "character":
        assert (found["errors"], found["length"]) == (1, 6)


def test_sources_stand_apart():
    given = rows(("a", "a"), source="x"), rows(("b", "c"), source="y")
    found = score("asr_en", given[0][0] + given[1][0], given[0][1] + given[1][1])
    assert (found["x"]["wer"], found["y"]["wer"]) == (0, 1)
    assert wer.not_reproduced("other") == []


def test_empty_texts_and_empty_references():
    assert score("asr_en", *rows(("one two", "")))["s"]["wer"] == 1
    assert score("asr_en", *rows(("", "")))["s"]["wer"] is None
    assert score("asr_en", *rows(("...", "word"), ("word", "word")))["s"]["errors"] == 1


def test_bleu_with_its_signature_and_the_target_languages_tokenizer():
    pairs = [("Das ist ein kleines Haus am See.", "Das ist ein kleines Haus am Meer.")]
    found = score("translation", *rows(*pairs, source="covost2_en_de_test"))["covost2_en_de_test"]
    # 8 tokens; matched n-grams 7/8, 5/7, 4/6, 3/5; no brevity penalty.
    assert found["bleu"] == pytest.approx(100 * (7 / 8 * 5 / 7 * 4 / 6 * 3 / 5) ** 0.25)
    assert "tok:13a" in found["signature"]
    assert sacrebleu.__version__ in found["signature"]
    chinese = score("translation", *rows(("今天天气很好", "今天天气很好"), source="covost2_en_zh_test"))
    assert chinese["covost2_en_zh_test"]["bleu"] == pytest.approx(100)
    assert "tok:zh" in chinese["covost2_en_zh_test"]["signature"]


def test_a_nameless_target_is_an_error():
    with pytest.raises(CannotScore, match="'covost2' names no target language"):
        score("translation", *rows(("x", "x"), source="covost2"))


@pytest.mark.skipif(find_spec("MeCab") is not None, reason="the tokenizer is installed")
def test_a_missing_tokenizer_is_an_error():
    with pytest.raises(
        CannotScore, match=r"'covost2_en_ja_test': the tokenizer ja-mecab is not installed; pip"
    ):
        score("translation", *rows(("x", "x"), source="covost2_en_ja_test"))


def test_accuracy_is_exact_after_leading_blanks():
    pairs = [("neutral", " neutral"), ("neutral", "Neutral"), ("joy", "joy."), ("joy", "joy")]
    for kind in ("emotion", "vocal_sound", "scene"):
        assert score(kind, *rows(*pairs))["s"] == {"accuracy": 0.5, "n": 4}


def test_aqa_has_a_binary_accuracy_of_its_own():
    found = score("aqa", *rows(("yes", "yes"), ("no", "yes"), ("yes", "yes"), ("rain", "wind")))["s"]
    assert found == {"accuracy": 0.5, "binary_accuracy": 2 / 3, "n_binary": 3, "n": 4}
    assert score("aqa", *rows(("rain", "rain")))["s"]["binary_accuracy"] is None


STAMPED = (
    "<|0.00|><|sil|><|0.54|>面<|0.86|>条<|1.17|>机<|1.46|><|sil|><|2.01|>"  # the example in EVALUATION.md
)


def test_stamps_are_parsed():
    found = srwt.parse("<|startoftranscript|><|zh|><|transcribe|>" + STAMPED)
    assert found is not None
    assert found.words == ("<|sil|>", "面", "条", "机", "<|sil|>")
    assert found.times_s == (0, 0.54, 0.86, 1.17, 1.46, 2.01)
    for bad in ("面条", "<|0.10|>面", "<|0.10|>面<|0.20|><|0.30|>", "<|0.50|>面<|0.20|>"):
        assert srwt.parse(bad) is None


def test_accumulated_shift_by_hand():
    # Words 面 .54-.86 and 机 1.17-1.46 are found 40 ms and 10 ms off at both ends, the stamp between 面 and
    # 条 30 ms; 条 is heard as 跳. Matched: sil (0 + .04), 面 (.04 + .03), 机 (.01 + .01), sil (.01 + 0).
    text = "<|0.00|><|sil|><|0.58|>面<|0.89|>跳<|1.18|>机<|1.47|><|sil|><|2.01|>"
    found = score("srwt", *rows((STAMPED, text)))["s"]
    assert found["aas_ms"] == pytest.approx(1000 * (0.04 + 0.07 + 0.02 + 0.01) / 4)
    assert (found["words_matched"], found["words"], found["malformed"]) == (4, 5, 0)
    assert found["cer"] == pytest.approx(1 / 3)


def test_malformed_pairs_are_counted_and_shift_no_others():
    found = score("srwt", *rows((STAMPED, "面条机"), (STAMPED, STAMPED)))["s"]
    assert (found["malformed"], found["aas_ms"], found["words"]) == (1, 0, 5)
    assert score("srwt", *rows((STAMPED, "")))["s"]["aas_ms"] is None


def test_alignment_of_words_inserted_and_repeated():
    assert srwt.align("abc", "abc") == [(0, 0), (1, 1), (2, 2)]
    assert srwt.align("ac", "abc") == [(0, 0), (1, 2)]
    assert srwt.align("aab", "ab") == [(1, 0), (2, 1)]  # of equally short ones, pairing from the end
    assert srwt.align("", "ab") == []


def test_rows_are_read_and_bad_ones_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = {"audio": "a.wav", "prompt": "p", "gt": "g\u2028h", "source": "s"}
    path.write_text(json.dumps(good, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_utterances(path) == [Utterance("a.wav", "p", "g\u2028h", "s")]
    ours = {"audio_language": "de", "text_language": "en", "question": "Why?"}
    path.write_text(json.dumps(good | ours) + "\n", encoding="utf-8")
    assert read_utterances(path) == [Utterance("a.wav", "p", "g\u2028h", "s", "de", "en", "Why?")]
    path.write_text(json.dumps(good | {"question": 7}) + "\n", encoding="utf-8")
    with pytest.raises(BadBenchmark, match="rows.jsonl:1: no text under question"):
        read_utterances(path)
    for line, said in (
        ("{", "is not JSON"),
        ("3", "is a int"),
        ('{"audio": "a"}', "no text under prompt, gt, source"),
    ):
        path.write_text(json.dumps(good) + "\n" + line, encoding="utf-8")
        with pytest.raises(BadBenchmark, match=rf"rows\.jsonl:2: {said}"):
            read_utterances(path)


def test_published_rows_carry_source_and_warning():
    best, converted = published.air_bench_chat()[:2]
    assert (best["policy"], round(best["overall"], 2)) == ("Qwen2-Audio", 6.93)
    assert (converted["policy"], converted["overall"]) == ("Qwen2-Audio (Hugging Face)", pytest.approx(6.805))
    qwen_audio = next(row for row in published.air_bench_chat() if row["policy"] == "Qwen-Audio")
    assert qwen_audio["mixed"] == 5.38  # not 6.08, the average that the paper prints there
    assert round(qwen_audio["overall"], 2) == 6.08
    assert "2402.07729" in qwen_audio["source"]
    assert any("6.08" in line for line in published.warnings())
    assert "not comparable" in published.warnings()[0]
    test_other = {
        row.policy: row.value for row in published.benchmarks() if row.benchmark == "librispeech_test_other"
    }
    assert test_other == {"qwen_audio": 0.042, "qwen2_audio": 0.036, "qwen2_audio_hf": 0.040}
    assert published.air_bench_foundation()[0]["average"] == 0.578


def test_differences_are_paired_by_row_and_their_means_are_the_corpus_rates():
    asked = rows(("one two three", ""), ("four", ""), ("五六", ""))[0]
    before, after = ["one two", "four", "五五"], ["one two three", "for four", "五六"]
    english = compare("asr_en", asked[:2], before[:2], after[:2])["s"]["wer"]
    assert english["before"] == pytest.approx(score("asr_en", asked[:2], before[:2])["s"]["wer"])
    assert english["after"] == pytest.approx(score("asr_en", asked[:2], after[:2])["s"]["wer"])
    assert english["ci_low"] < english["ci_high"]
    chinese = compare("asr_zh", asked[2:], before[2:], after[2:])["s"]["wer"]
    assert (chinese["before"], chinese["after"]) == (0.5, 0)  # by character
    found = compare("emotion", rows(("joy", ""), ("anger", ""))[0], ["joy", "joy"], [" joy", "anger"])
    assert (found["s"]["accuracy"]["before"], found["s"]["accuracy"]["after"]) == (0.5, 1)
    assert compare("translation", asked, before, after) == {}


def test_rows_with_unusable_clips_are_apart_and_prompts_hold_their_clip(tmp_path):
    soundfile.write(tmp_path / "good.flac", np.full(1600, 0.1, np.float32), 16000)
    (tmp_path / "bad.wav").write_bytes(b"")
    given = [
        {"audio": name, "prompt": "Recognize the speech:", "gt": "x", "source": "s"}
        for name in ("good.flac", "bad.wav", "../good.flac")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    found = open_rows(path, "asr_en")
    assert [row.audio for row in found.usable] == ["good.flac"]
    assert {one.code for one in found.missing} == {"empty_file", "outside_root"}
    bare = prompt_of("asr_en", found.usable[0])
    assert bare == "<|audio_bos|><|AUDIO|><|audio_eos|>Recognize the speech:"
    assert prompt_of("asr_en", found.usable[0]._replace(prompt=bare)) == bare
    path.write_text(json.dumps(given[1]) + "\n")
    with pytest.raises(BadBenchmark, match="none of 1 rows has a usable clip"):
        open_rows(path, "asr_en")


def test_multiple_choice_is_asked_as_its_publishers_lay_it_out_and_read_strictly(tmp_path):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", np.full(1600, 0.1, np.float32), 16000)
    asked = {"question": "What?", "choices": ["cat", "dog"], "answer": "dog"}
    given = [{"id": name, "audio_id": f"./{name}.wav", **asked} for name in ("a", "b", "gone")]
    path = tmp_path / "mini.json"
    path.write_text(json.dumps([*given, {**given[0], "answer": "cow"}, {**given[0], "choices": ["cat"]}]))
    found = open_rows(path, "choice")
    expected = ("mini", "dog", ("cat", "dog"))
    assert [(row.source, row.gt, row.choices) for row in found.usable] == [expected] * 2
    assert [one.code for one in found.missing] == ["no_question", "missing"]
    assert found.missing[0].id == "2 rows"
    assert prompt_of("choice", found.usable[0]).startswith("What? Please choose")
    right, neither, wrong = "<answer>The dog.</answer>", "cat or dog", "A"
    assert score("choice", found.usable, [right, neither]) == {
        "mini": {"accuracy": 0.5, "unparsed": 0.5, "n": 2}
    }
    change = compare("choice", found.usable, [wrong, neither], [right, "B"])["mini"]
    assert (change["accuracy"]["delta"], change["unparsed"]["delta"]) == (1.0, -0.5)
    answered = [{**row, "response": right} for row in given]
    (tmp_path / "answers.json").write_text(json.dumps(answered))
    rows_, texts, _ = read_answers(tmp_path / "answers.json", "choice")
    assert score("choice", rows_, texts)["answers"]["accuracy"] == 1


def test_published_numbers_stand_beside_what_they_are_of():
    def beside(source, split="test", **numbers):
        return {row.policy: row.value for row in published.beside(source, numbers, split)}

    clean = {"qwen_audio": 0.020, "qwen2_audio": 0.016, "qwen2_audio_hf": 0.017}
    assert beside("librispeech_test_clean", wer=0.1, unit="word") == clean
    assert beside("librispeech/librispeech_test_clean", wer=0.1, exact=0.2) == clean  # of a mixture
    assert beside("copy_2/librispeech_dev_clean", "dev", wer=0.1)["qwen2_audio"] == 0.013
    assert beside("covost2/covost2_en_de_test", bleu=20.0)["qwen2_audio"] == 29.9
    assert beside("meld/meld", accuracy=0.5)["qwen_audio"] == 0.557
    # Not of another split, metric, unit or name
    assert beside("meld/meld", "dev", accuracy=0.5) == {}
    assert beside("covost2/covost2_en_de_dev", "dev", bleu=20.0) == {}
    assert beside("covost2/covost2_en_de_test", wer=0.1) == {}
    assert beside("aishell1/aishell1_test", wer=0.1) == {}
    assert beside("aishell1_test", wer=0.1, unit="character") == {"qwen_audio": 0.013}
    assert beside("librispeech_test_clean", wer=0.1, unit="character") == {}
    assert beside("my_librispeech_test_clean", wer=0.1) == {}
    assert beside("librispeech_test_clean/mine", wer=0.1) == {}
