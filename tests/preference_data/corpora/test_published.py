"""Published corpora in their real layouts, a few made rows each: what is read, and into which split."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import soundfile

from preference_data.corpora import catalog
from preference_data.corpora.catalog import CARDS
from preference_data.corpora.published.recording import (
    BadCorpus,
    Content,
    QuestionAnswer,
    Recording,
    language,
)
from preference_data.prompts.prompts import prompt_of, target_of
from preference_data.schema import TaskExample, Word


def read(name: str, folder: Path) -> list[Recording]:
    """What an adapter finds; all of it can be put to a model, in either prompt format."""
    found = list(catalog.read(name, folder))
    for one in found:
        for content in one.contents:
            known = {key: value for key, value in content._asdict().items() if key != "benchmark"}
            example = TaskExample(id="x", audios=(one.path,), **known)
            assert prompt_of(example, "sentences")
            assert prompt_of(example, "tags_paper")
            assert prompt_of(example, "tags_released")
            assert target_of(example)
    return found


def read_lazily(name: str, folder: Path) -> Iterator[Recording]:
    return catalog.read(name, folder)


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


def tone(path: Path, hz: float = 440.0, seconds: float = 0.2, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate), rate)


def texts(found: Recording) -> dict[str, str]:
    return {content.task: content.text for content in found.contents}


def benchmarks(found: list[Recording]) -> set[str | None]:
    return {content.benchmark for one in found for content in one.contents} - {None}


def test_every_card_says_what_one_wants_to_know():
    for name, card in CARDS.items():
        assert card.name == name
        assert card.hours > 0
        assert card.licence
        assert card.home.startswith("https://")
        assert card.home in (import_module(f"preference_data.corpora.published.{name}").__doc__ or "")
    with pytest.raises(BadCorpus, match="unknown corpus 'os'; published ones: librispeech, common_voice"):
        next(catalog.read("os", Path()))


@pytest.mark.parametrize("name", CARDS)
def test_an_empty_folder_is_no_corpus_and_says_what_is_missing(name, tmp_path):
    with pytest.raises(BadCorpus, match=f"align data download|{tmp_path}"):
        read(name, tmp_path)


# ---------------------------------------------------------------- speech


def test_librispeech(tmp_path):
    root = tmp_path / "LibriSpeech"
    write(
        root / "SPEAKERS.TXT",
        ";ID |SEX| SUBSET\n14   | F | train-clean-100 | 25.0 | A B\n84 | M | dev | 8 | C\n",
    )
    write(root / "train-clean-100/14/208/14-208.trans.txt", "14-208-0000 CHAPTER ONE\n14-208-0001 IT WAS\n")
    write(root / "dev-clean/84/121/84-121.trans.txt", "84-121-0000 GO DO YOU HEAR\n")
    write(
        root / "dev-clean/84/121/84-121.alignment.txt",
        '84-121-0000 ",GO,,DO,YOU,HEAR," "0.490,0.890,1.270,1.380,1.490,1.890,2.09"\n',
    )
    write(root / "test-other/7/8/7-8.trans.txt", "7-8-0000 NO ONE'S\n")
    found = read("librispeech", tmp_path)
    assert [(one.path, one.split, one.speaker) for one in found] == [
        ("LibriSpeech/test-other/7/8/7-8-0000.flac", "test", "7"),
        ("LibriSpeech/dev-clean/84/121/84-121-0000.flac", "dev", "84"),
        ("LibriSpeech/train-clean-100/14/208/14-208-0000.flac", "train", "14"),
        ("LibriSpeech/train-clean-100/14/208/14-208-0001.flac", "train", "14"),
    ]
    assert [texts(one) for one in found] == [
        {"transcribe": "no one's"},  # of a speaker that the table does not know
        {"transcribe": "go do you hear", "transcribe_words": "go do you hear", "gender": "male"},
        {"transcribe": "chapter one", "gender": "female"},
        {"transcribe": "it was", "gender": "female"},
    ]
    assert found[1].contents[1].words == (
        Word(text="go", start_s=0.49, end_s=0.89),
        Word(text="do", start_s=1.27, end_s=1.38),
        Word(text="you", start_s=1.38, end_s=1.49),
        Word(text="hear", start_s=1.49, end_s=1.89),
    )
    assert benchmarks(found) >= {"librispeech_test_other", "librispeech_dev_clean"}
    assert read("librispeech", root)[0].path == "test-other/7/8/7-8-0000.flac"  # named one folder deeper


def test_librispeech_refuses_a_foreign_utterance_and_uneven_alignments(tmp_path):
    transcripts = write(tmp_path / "dev-clean/84/121/84-121.trans.txt", "85-121-0000 GO\n")
    with pytest.raises(BadCorpus, match=r"84-121.trans.txt:1: '85-121-0000' is not an utterance of 84"):
        read("librispeech", tmp_path)
    write(transcripts, "84-121-0000 GO\n")
    write(transcripts.with_name("84-121.alignment.txt"), '84-121-0000 ",GO," "0.49,0.89"\n')
    with pytest.raises(BadCorpus, match=r"84-121.alignment.txt:1: 3 words, 2 times"):
        read("librispeech", tmp_path)


CV = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment\n"


def test_common_voice(tmp_path):
    root = tmp_path / "cv-corpus-15.0-2023-09-08"
    for locale, sentence in (("en", 'He said "no'), ("zh-CN", "你好"), ("zh-HK", "早晨")):
        (root / locale / "clips").mkdir(parents=True)
        row = f"abc{locale}\tcommon_{locale}.mp3\t{sentence}\t2\t0\ttwenties\tfemale\t\t{locale}\t\n"
        write(root / locale / "test.tsv", CV + row)
    write(root / "en/train.tsv", CV + "def\tt.mp3\tYes.\t2\t0\t\tmale_masculine\t\ten\t\n")
    found = read("common_voice", tmp_path)
    assert [(one.path.split("/", 1)[1], one.split) for one in found] == [
        ("en/clips/common_en.mp3", "test"),
        ("zh-CN/clips/common_zh-CN.mp3", "test"),
        ("zh-HK/clips/common_zh-HK.mp3", "test"),
        ("en/clips/t.mp3", "train"),
    ]
    assert texts(found[0]) == {
        "transcribe": 'He said "no',  # a lone quote does not eat the following lines
        "language_id": "English",
        "gender": "female",
        "age": "twenties",
    }
    assert texts(found[3]) == {"transcribe": "Yes.", "language_id": "English", "gender": "male"}
    assert benchmarks(found) == {"common_voice_15_en", "common_voice_15_zh", "common_voice_15_yue"}
    assert found[0].speaker != found[1].speaker
    assert "abc" not in str(found[0].speaker)


def test_a_table_of_another_version_or_cut_off_is_named(tmp_path):
    (tmp_path / "en" / "clips").mkdir(parents=True)
    table = write(tmp_path / "en" / "test.tsv", "client_id\tpath\tage\tgender\na\tb\tc\td\n")
    with pytest.raises(
        BadCorpus, match=r"en/test.tsv: no column sentence; there are client_id, path, age, gender"
    ):
        read("common_voice", tmp_path)
    write(table, CV + "a\tb.mp3\tHi\t2\t0\t\t\t\ten\t\na\tc.m")
    with pytest.raises(BadCorpus, match=r"en/test.tsv:3: has fewer cells than columns"):
        read("common_voice", tmp_path)
    table.write_bytes(CV.encode() + b"a\tb.mp3\t\xff\t2\t0\t\t\t\ten\t\n")
    with pytest.raises(BadCorpus, match="is not such a table: 'utf-8' codec"):
        read("common_voice", tmp_path)


def test_aishell1(tmp_path):
    for path in (
        "train/S0002/BAC009S0002W0122",
        "test/S0764/BAC009S0764W0121",
        "test/S0764/BAC009S0764W0999",
    ):
        tone(tmp_path / f"data_aishell/wav/{path}.wav")
    write(
        tmp_path / "data_aishell/transcript/aishell_transcript_v0.8.txt",
        "BAC009S0002W0122 而 对 楼市\nBAC009S0764W0121 甚至 出现\n",
    )
    write(tmp_path / "resource_aishell/speaker.info", "0002 F\n0764 M\n")
    found = read("aishell1", tmp_path)
    assert [(one.split, one.speaker, texts(one)) for one in found] == [
        ("test", "S0764", {"transcribe": "甚至出现", "gender": "male"}),  # W0999 has no transcript
        ("train", "S0002", {"transcribe": "而对楼市", "gender": "female"}),
    ]
    assert benchmarks(found[:1]) == {"aishell1_test"}


def test_covost2_joins_all_translations_of_a_recording(tmp_path):
    write(
        tmp_path / "covost_v2.en_de.tsv", "path\ttranslation\tsplit\na.mp3\tHallo\ttest\nb.mp3\tJa\ttrain\n"
    )
    write(
        tmp_path / "covost_v2.en_zh-CN.tsv",
        "path\ttranslation\tsplit\nb.mp3\t是\tdev\nc.mp3\t不\ttrain_covost\n",
    )
    write(
        tmp_path / "en/validated.tsv",
        "client_id\tpath\tsentence\ns1\ta.mp3\tHello\ns2\tb.mp3\tYes\ns3\tc.mp3\tNo\n"
        "s4\td.mp3\tNever translated\n",
    )
    found = read("covost2", tmp_path)
    assert [(one.path, one.split) for one in found] == [
        ("en/clips/a.mp3", "test"),
        ("en/clips/b.mp3", "dev"),  # one pair trains on it, the other holds it out
        ("en/clips/c.mp3", "train"),
    ]
    assert found[1].contents == (
        Content("transcribe", "Yes", "en", "en"),
        Content("translate_speech", "Ja", "en", "de", benchmark="covost2_en_de_dev"),
        Content("translate_speech", "是", "en", "zh", benchmark="covost2_en_zh_dev"),
    )
    write(tmp_path / "covost_v2.en_de.tsv", "path\ttranslation\tsplit\na.mp3\tHallo\tdevtest\n")
    with pytest.raises(BadCorpus, match="split 'devtest' is none of test, dev, train, train_covost"):
        read("covost2", tmp_path)


def test_meld(tmp_path):
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,"
    header += "StartTime,EndTime\n"
    write(
        tmp_path / "MELD.Raw/train_sent_emo.csv",
        header + '1,"Wasn\x92t it, \x93so\x94?",Joey,surprise,negative,3,1,8,21,"00:16","00:21"\n',
    )
    write(tmp_path / "MELD.Raw/test_sent_emo.csv", header + "1,No.,Ross,neutral,neutral,0,2,1,1,0,1\n")
    tone(tmp_path / "MELD.Raw/output_repeated_splits_test/dia0_utt2.flac")
    found = read("meld", tmp_path)
    assert [(one.path, one.split, one.speaker) for one in found] == [
        ("MELD.Raw/output_repeated_splits_test/dia0_utt2.flac", "test", None),
        ("MELD.Raw/train_splits/dia3_utt1.wav", "train", None),  # as FFmpeg will make it
    ]
    assert texts(found[1]) == {"emotion": "surprise", "transcribe": 'Wasn\'t it, "so"?'}
    assert found[1].questions == (QuestionAnswer("What emotion does the speaker express?", "surprise"),)
    assert benchmarks(found) == {"meld"}


def test_vocalsound_with_and_without_a_header(tmp_path):
    for name in ("f0003_0_throatclearing", "m0004_0_laughter", "m0009_0_cough"):
        tone(tmp_path / f"audio_16k/{name}.wav")
    write(tmp_path / "meta/tr_meta.csv", "f0003,female,28,United States,English,no\n")
    write(
        tmp_path / "meta/te_meta.csv",
        "spk_id,gender,age,country,language,health\nm0004,male,,India,Hindi,no\n",
    )
    write(tmp_path / "meta/val_meta.csv", "")
    found = read("vocalsound", tmp_path)
    assert [(one.split, one.speaker, texts(one)) for one in found] == [
        ("test", "m0004", {"vocal_sound": "laughter", "gender": "male"}),
        ("train", "f0003", {"vocal_sound": "throat clearing", "gender": "female", "age": "28"}),
    ]


# ------------------------------------------------------- sound, music, questions

CAPTIONS = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"


def test_clotho(tmp_path):
    write(
        tmp_path / "clotho_captions_development.csv",
        CAPTIONS + '"a, b.wav",Rain falls,Rain,It rains,"Rain, on tin",Wet\n',
    )
    write(tmp_path / "clotho_captions_evaluation.csv", CAPTIONS + "c.wav,A,B,C,D,E\n")
    found = read("clotho", tmp_path)
    assert [(one.path, one.split) for one in found] == [
        ("evaluation/c.wav", "test"),
        ("development/a, b.wav", "train"),
    ]
    assert [content.text for content in found[1].contents] == [
        "Rain falls",
        "Rain",
        "It rains",
        "Rain, on tin",
        "Wet",
    ]
    assert {content.task for content in found[1].contents} == {"caption_clotho"}
    assert len(found[1].questions) == 1


def test_what_systems_leave_behind_is_no_recording(tmp_path):
    """A folder that a Mac has packed, or a notebook was opened in."""
    chapter = tmp_path / "LibriSpeech/dev-clean/84/121"
    write(chapter / "84-121.trans.txt", "84-121-0000 GO\n")
    (chapter / "._84-121.trans.txt").write_bytes(b"\0\5\x16\7\xff")
    assert [one.path for one in read("librispeech", tmp_path)] == [
        "LibriSpeech/dev-clean/84/121/84-121-0000.flac"
    ]
    header = "audiocap_id,youtube_id,start_time,caption\n"
    write(tmp_path / "train.csv", (header + "1,aaa,30,A dog\n2,bbb,0,A cat\n").replace(",", ";"))
    for name in (
        "aaa.WAV",
        "._aaa.wav",
        "__MACOSX/aaa.wav",
        ".ipynb_checkpoints/aaa.wav",
        "bbb.M4A",
        "bbb.txt",
    ):
        tone(tmp_path / "audio" / name) if name[0] == "a" else write(tmp_path / "audio" / name, "x")
    assert [one.path for one in read("audiocaps", tmp_path)] == ["audio/aaa.WAV", "audio/bbb.M4A"]


def test_audiocaps_finds_audio_however_it_is_named(tmp_path):
    header = "audiocap_id,youtube_id,start_time,caption\n"
    write(tmp_path / "train.csv", header + "1,aaa,30,A dog\n2,bbb,0,A cat\n3,ccc,10,Rain\n4,-d_d,5,Wind\n")
    write(tmp_path / "test.csv", header + "5,eee,0,One\n6,eee,0,Two\n")
    for name in ("train/aaa.wav", "train/Ybbb.flac", "4.mp3", "test/eee_0.wav"):
        tone(tmp_path / "audio" / name)
    found = read("audiocaps", tmp_path)
    assert [(one.path, one.split) for one in found] == [
        ("audio/test/eee_0.wav", "test"),
        ("audio/train/aaa.wav", "train"),
        ("audio/train/Ybbb.flac", "train"),
        ("audio/ccc.wav", "train"),  # not there; its absence will be counted
        ("audio/4.mp3", "train"),
    ]
    assert [content.text for content in found[0].contents] == ["One", "Two"]


def test_clothoaqa_takes_the_majority_for_training_and_everybody_for_the_benchmark(tmp_path):
    header = "file_name,QuestionText,answer,confidence\n"
    rows = "".join(f"r.wav,Is it rain?,{answer},yes\n" for answer in ("yes", "Yes", "no"))
    rows += "".join(f"r.wav,What falls?,{answer},yes\n" for answer in ("rain", "hail", "water"))
    write(tmp_path / "clotho_aqa_train.csv", header + rows)
    write(tmp_path / "clotho_aqa_test.csv", header + rows.replace("r.wav", "t.wav"))
    test, train = read("clothoaqa", tmp_path)
    assert train.path == "audio_files/r.wav"
    assert train.contents == (
        Content("question_answer", "yes", None, "en", "Is it rain?", benchmark="clothoaqa"),
    )
    assert train.questions == (QuestionAnswer("Is it rain?", "yes"),)
    assert test.split == "test"
    assert [content.text for content in test.contents] == ["yes", "Yes", "no", "rain", "hail", "water"]


def test_musiccaps(tmp_path):
    header = "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,"
    header += "is_balanced_subset,is_audioset_eval\n"
    write(
        tmp_path / "musiccaps-public.csv",
        header
        + '-a,30,40,"/m/04","[\'sad piano\', \'low quality\']","A sad, slow piano.",4,False,True\n'
        + 'bb,0,10,"/m/05",[],Drums.,1,False,False\n',
    )
    tone(tmp_path / "audio/-a.wav")
    found = read("musiccaps", tmp_path)
    assert [(one.path, one.split, texts(one)) for one in found] == [
        (
            "audio/-a.wav",
            "test",
            {"describe_music": "A sad, slow piano.", "keyword": "sad piano, low quality"},
        ),
        ("audio/bb.wav", "train", {"describe_music": "Drums."}),
    ]
    write(tmp_path / "musiccaps-public.csv", header + "cc,0,10,/m,__import__('os').abort(),D,1,False,False\n")
    with pytest.raises(BadCorpus, match="aspect_list of 'cc' is not a list"):
        read("musiccaps", tmp_path)


def note(name: str, **more: object) -> dict[str, object]:
    instrument, pitch, velocity = name.rsplit("-", 2)
    return {
        "note_str": name,
        "instrument_str": instrument,
        "pitch": int(pitch),
        "velocity": int(velocity),
        "instrument_family_str": instrument.split("_")[0],
        "instrument_source_str": instrument.split("_")[1],
        "qualities_str": [],
        **more,
    }


def test_nsynth(tmp_path):
    train = {
        "bass_synthetic_033-022-050": note("bass_synthetic_033-022-050", qualities_str=["dark", "fast_decay"])
    }
    test = {"keyboard_acoustic_004-060-127": note("keyboard_acoustic_004-060-127")}
    write(tmp_path / "nsynth-train/examples.json", json.dumps(train))
    write(tmp_path / "nsynth-test/examples.json", json.dumps(test))
    found = read("nsynth", tmp_path)
    assert [(one.path, one.split, one.source) for one in found] == [
        ("nsynth-test/audio/keyboard_acoustic_004-060-127.wav", "test", "nsynth_acoustic"),
        ("nsynth-train/audio/bass_synthetic_033-022-050.wav", "train", "nsynth_synthetic"),
    ]
    assert texts(found[1]) == {
        "instrument": "bass",
        "note_pitch": "22",
        "note_velocity": "50",
        "note_qualities": "dark, fast decay",
    }
    write(tmp_path / "nsynth-test/examples.json", '{"x": {"pitch": 1}}')
    with pytest.raises(BadCorpus, match="'x' has no velocity, instrument_str"):
        read("nsynth", tmp_path)


def test_a_large_table_of_notes_is_read_piece_by_piece_and_a_cut_one_is_refused(tmp_path):
    names = [f"bass_a, {n}-022-050" for n in range(3000)]  # more than the reader takes at once
    whole = {name: note(name, qualities_str=['a "quoted" }', "x"]) for name in names}
    table = tmp_path / "nsynth-test/examples.json"
    write(table, json.dumps(whole, indent=1))
    recordings = read_lazily("nsynth", tmp_path)
    assert [next(recordings).path, *(one.path for one in recordings)] == [
        f"nsynth-test/audio/{name}.wav" for name in names
    ]
    write(table, "{}")
    assert list(read_lazily("nsynth", tmp_path)) == []
    text = json.dumps(whole)
    for cut in (text[:-1], text[: len(text) // 2], text[1:], "[1]", ""):
        write(table, cut)
        with pytest.raises(BadCorpus, match="is not a JSON object, or is cut off"):
            list(read_lazily("nsynth", tmp_path))


def test_air_bench_is_test_only_and_each_clip_comes_once(tmp_path):
    item = {"path": "a.mp3", "question": "Q?", "answer_gt": "A", "meta_info": "", "task_name": "speech_QA"}
    items = [{**item, "dataset_name": "cv", "uniq_id": n} for n in range(2)] + [
        {**item, "path": "b.wav", "dataset_name": "iemocap", "uniq_id": 2}
    ]
    write(tmp_path / "Chat/Chat_meta.json", json.dumps(items))
    assert read("air_bench", tmp_path) == [
        Recording("Chat/speech_QA_cv/a.mp3", "test", "air_bench/speech_QA_cv", ()),
        Recording("Chat/speech_QA_iemocap/b.wav", "test", "air_bench/speech_QA_iemocap", ()),
    ]
    write(tmp_path / "Chat/Chat_meta.json", json.dumps([{"path": 3}]))
    with pytest.raises(BadCorpus, match="item 0: no text under path, task_name, dataset_name"):
        read("air_bench", tmp_path)


def test_languages_of_locales():
    assert [language(locale) for locale in ("zh-CN", "zh-HK", "yue", "sv-SE", "en")] == [
        "zh",
        "yue",
        "yue",
        "sv",
        "en",
    ]
