"""AIR-Bench as downloaded: damaged clips, answers in and out, foundation, the official aggregation."""

import json
import random

import numpy as np
import pytest
import soundfile

from align.evaluation.aggregation import as_scores, weights
from align.evaluation.benchmarks import air_bench
from align.evaluation.benchmarks.air_bench import Item
from align.evaluation.benchmarks.rows import BadBenchmark
from align.evaluation.judged_answers import JudgedAnswer, OrderReply


def row_of(uniq_id, state, score, reference, replies):
    item = Item(uniq_id, "0.wav", "q", "a", "m", "sound_QA", "made")
    return JudgedAnswer.to(item, "r", state=state, score=score, reference_score=reference, replies=replies)


SETS = {
    "speech_QA": "common_voice_en",
    "speech_dialogue_QA": "spokenwoz",
    "sound_QA": "clotho",
    "sound_generation_QA": "clotho",
    "music_QA": "musiccaps",
    "music_generation_analysis_QA": "musiccaps",
    "speech_and_sound_QA": "audiocaps_cv",
    "speech_and_music_QA": "musiccaps_cv",
}


def official_folder(root, per_task=4):
    """Chat/ as downloaded: two questions per clip, one SpokenWOZ clip empty, one cut off, one not there."""
    rows = []
    for task, dataset in SETS.items():
        folder = root / "Chat" / f"{task}_{dataset}"
        folder.mkdir(parents=True)
        for n in range(per_task):
            ending = "mp3" if dataset == "common_voice_en" else "wav"
            name = f"{n // 2}.{ending}"
            tone = 0.1 * np.sin(np.arange(4000) * (n + 1) / 10)
            soundfile.write(folder / name, tone, 16_000)
            rows.append(
                {
                    "path": name,
                    "question": f"What is heard in {task}?",
                    "answer_gt": "A tone.",
                    "meta_info": "{'sound': 'tone'}",
                    "task_name": task,
                    "dataset_name": dataset,
                    "uniq_id": len(rows),
                }
            )
    (root / "Chat/speech_dialogue_QA_spokenwoz/0.wav").write_bytes(b"")
    clip = root / "Chat/sound_QA_clotho/1.wav"
    clip.write_bytes(clip.read_bytes()[:1000])
    (root / "Chat/music_QA_musiccaps/1.wav").unlink()
    (root / "Chat/Chat_meta.json").write_text(json.dumps(rows), encoding="utf-8")
    return root


@pytest.fixture
def root(tmp_path):
    return official_folder(tmp_path)


def test_damaged_clips_are_counted_with_their_reason(root):
    items = air_bench.read(root)
    assert len(items) == 32
    assert items[0].audio == "Chat/speech_QA_common_voice_en/0.mp3"
    usable, missing, seconds = air_bench.audit(root, items)
    assert len(usable) == 26
    assert len(seconds) == 13  # clips, not questions
    assert [(one.uniq_id, one.code) for one in missing] == [
        ("4", "empty_file"),
        ("5", "empty_file"),
        ("10", "truncated"),
        ("11", "truncated"),
        ("18", "missing"),
        ("19", "missing"),
    ]
    assert "speech_dialogue_QA_spokenwoz/0.wav" in missing[0].why


def test_answers_survive_the_official_jsonl(root):
    items = air_bench.read(root)
    path = root / "answers.jsonl"
    responses = [f"line one\nzwei \u2028 {item.uniq_id}" for item in items]
    air_bench.write_answers(path, items, responses)
    row = json.loads(path.read_text(encoding="utf-8").split("\n")[3])
    assert list(row) == [
        *("meta_info", "question", "answer_gt", "path", "task_name", "dataset_name", "response", "uniq_id")
    ]
    assert row["uniq_id"] == 3  # a number, as the official files have it
    assert air_bench.read_answers(path) == list(zip(items, responses, strict=True))


def answer(**changes):
    row = {
        "meta_info": "m",
        "question": "q",
        "answer_gt": "a",
        "path": "p.wav",
        "task_name": "sound_QA",
        "dataset_name": "clotho",
        "response": "r",
        "uniq_id": 7,
    } | changes
    return json.dumps({key: value for key, value in row.items() if value != "absent"})


def test_answers_made_elsewhere(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + answer(response="a \u2028 b"), encoding="utf-8")
    assert air_bench.read_answers(path)[0][1] == "a \u2028 b"
    path.write_text(answer(gen="8 7", response=None) + "\n\n" + answer(uniq_id="x"), encoding="utf-8")
    (item, response), second = air_bench.read_answers(path)
    assert (item.uniq_id, response, second[0].uniq_id) == ("7", "", "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no answers"),
        (answer() + "\n{oops", r"a\.jsonl:2: is not JSON"),
        ("[1]", r"a\.jsonl:1: is a list, not an object"),
        (answer(meta_info="absent"), r"a\.jsonl:1: no meta_info"),
        (answer(answer_gt=None), r"a\.jsonl:1: no answer_gt"),
        (answer(response="absent"), r"a\.jsonl:1: no response"),
        (answer(response=["x"]), r"a\.jsonl:1: response is a list, not text"),
        (
            answer(task_name="smell_QA"),
            r"a\.jsonl:1: unknown task_name 'smell_QA'; AIR-Bench chat has speech_QA",
        ),
        (answer() + "\n" + answer(), "uniq_id '7' comes more than once"),
    ],
)
def test_bad_answers_are_named_by_line_and_key(tmp_path, text, said):
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadBenchmark, match=said):
        air_bench.read_answers(path)


def test_a_meta_file_that_is_no_list_and_twins_are_refused(root):
    meta = root / "Chat/Chat_meta.json"
    rows = json.loads(meta.read_text(encoding="utf-8"))
    meta.write_text(json.dumps([rows[0], rows[1] | {"uniq_id": "0"}]), encoding="utf-8")
    with pytest.raises(BadBenchmark, match="uniq_id '0' comes more than once"):
        air_bench.read(root)
    meta.write_text("{}", encoding="utf-8")
    with pytest.raises(BadBenchmark, match="holds a dict, not a list"):
        air_bench.read(root)
    meta.write_text("<html>", encoding="utf-8")
    with pytest.raises(BadBenchmark, match="is not JSON"):
        air_bench.read(root)


# --- the official aggregation, slow and obvious, with its defects -------------------------------------


def official_cal_score(rows, *, swapped):
    """What cal_score.py prints of one order's judge replies: per group (n, win rate, "gpt4", "llm").

    Its labels are fixed: the first number is always called the reference's, also in the swapped file. What
    is not two integers is left out. A number above 10 ends the script.
    """
    groups = {
        "speech": ("speech_QA", "speech_dialogue_QA"),
        "sound": ("sound_QA", "sound_generation_QA"),
        "music": ("music_QA", "music_generation_analysis_QA"),
        "speech_and_sound": ("speech_and_sound_QA",),
        "speech_and_music": ("speech_and_music_QA",),
    }
    printed = {}
    numbers = [part for _, text in rows for part in text.split(" ") if len(text.split(" ")) == 2]
    if any(part.isdecimal() and int(part) > 10 for part in numbers):
        raise SystemExit(1)
    for group, tasks in groups.items():
        total = wins = first_sum = second_sum = 0
        for task, text in rows:
            if task not in tasks:
                continue
            parts = text.strip().replace("\n", "").split(" ")
            if len(parts) != 2:
                continue
            try:
                first, second = int(parts[0]), int(parts[1])
            except ValueError:
                continue
            total += 1
            first_sum += first
            second_sum += second
            wins += first > second if swapped else second > first
        printed[group] = (total, wins / total, first_sum / total, second_sum / total)
    return printed


def leaderboard(groups):
    """The published row, by hand from the printed means."""
    mixed = (groups["speech_and_sound"] + groups["speech_and_music"]) / 2
    four = {name: groups[name] for name in ("speech", "sound", "music")} | {"mixed": mixed}
    return four, sum(four.values()) / 4


def reply(order, text):
    """A judge's reply as our judge hands it on; here it is parsed as the official script would."""
    parts = text.split(" ")
    try:
        first, second = (int(part) for part in parts)
    except ValueError:
        return OrderReply(order, None, None, "invalid", text, "stop", 1, 1)
    if order == "response_first":
        first, second = second, first
    return OrderReply(order, float(first), float(second), "scored", text, "stop", 1, 1)


def rating(item, texts):
    replies = tuple(reply(order, text) for order, text in texts.items())
    if any(one.state != "scored" for one in replies):
        return row_of(item.uniq_id, "invalid", None, None, replies)
    mean = [sum(getattr(one, who) for one in replies) / 2 for who in ("response", "reference")]
    return row_of(item.uniq_id, "scored", mean[0], mean[1], replies)


def judged(root, seed=0):
    """Every item's replies in both orders; some are prose, some decimal, some half parsed."""
    rng = random.Random(seed)
    items = air_bench.read(root)
    texts = []
    for _ in items:
        one = {
            "reference_first": f"{rng.randint(5, 10)} {rng.randint(0, 10)}",
            "response_first": f"{rng.randint(0, 10)} {rng.randint(5, 10)}",
        }
        if rng.random() < 0.2:
            one[rng.choice(list(one))] = rng.choice(["8.5 7", "Both are good.", "8, 7", ""])
        texts.append(one)
    return items, texts


def test_the_official_aggregation_to_the_last_digit(tmp_path):
    items, texts = judged(official_folder(tmp_path, per_task=30))
    ratings = [rating(item, one) for item, one in zip(items, texts, strict=True)]
    scores = as_scores(items, ratings)
    finals = []
    for order, swapped in (("reference_first", False), ("response_first", True)):
        rows = [(item.task_name, one[order]) for item, one in zip(items, texts, strict=True)]
        printed = official_cal_score(rows, swapped=swapped)
        response, reference = (
            (2, 3) if swapped else (3, 2)
        )  # the swapped file prints them the wrong way round
        four, overall = leaderboard({name: one[response] for name, one in printed.items()})
        ours = scores["orders"][order]
        assert ours["categories"] == four
        assert ours["overall"] == overall
        assert ours["n"] == sum(one[0] for one in printed.values())
        assert (
            ours["reference"]["categories"]
            == leaderboard({name: one[reference] for name, one in printed.items()})[0]
        )
        finals.append(four)
    assert scores["official"]["categories"] == {
        name: (finals[0][name] + finals[1][name]) / 2 for name in finals[0]
    }
    # Ours needs both orders of an item, so where one could not be read the two differ, and that is seen.
    assert scores["states"]["invalid"] == sum(one.state == "invalid" for one in ratings) > 0
    assert scores["overall"] != scores["official"]["overall"]
    kept = [i for i, one in enumerate(ratings) if one.state == "scored"]
    same = as_scores([items[i] for i in kept], [ratings[i] for i in kept])
    assert same["overall"] == pytest.approx(same["official"]["overall"], abs=1e-12)


def test_a_score_above_ten_ends_the_official_script_and_is_only_invalid_here(root):
    items = air_bench.read(root)
    with pytest.raises(SystemExit):
        official_cal_score([("sound_QA", "11 3")], swapped=False)
    broken = OrderReply("reference_first", None, None, "invalid", "11 3", "stop", 1, 1)
    scores = as_scores(items, [row_of("0", "invalid", None, None, (broken,))])
    assert scores["states"] == {"scored": 0, "invalid": 1, "refused": 0, "inconsistent": 0, "missing": 31}
    assert scores["overall"] is None
    assert scores["worst_case"]["overall"] == 1


def items_of(*tasks):
    return [Item(str(i), f"{i}.wav", "q", "a", "m", task, "made") for i, task in enumerate(tasks)]


def scored(uniq_id, score, reference=8.0, state="scored"):
    kept = score if state == "scored" else None
    return row_of(uniq_id, state, kept, reference if kept is not None else None, ())


def test_means_by_hand():
    # speech is micro: (6 + 6 + 3) / 3 = 5; mixed is the mean of its sets: ((8 + 4) / 2 + 2) / 2 = 4.
    items = items_of(
        *("speech_QA", "speech_QA", "speech_dialogue_QA", "sound_QA", "music_QA"),
        *("speech_and_sound_QA", "speech_and_sound_QA", "speech_and_music_QA", "sound_QA", "music_QA"),
    )
    given = [6, 6, 3, 7, 9, 8, 4, 2]
    ratings = [scored(str(i), float(score)) for i, score in enumerate(given)]
    ratings.append(scored("8", 9.0, state="inconsistent"))
    found = as_scores(items, ratings[::-1])
    assert found["categories"] == {"speech": 5, "sound": 7, "music": 9, "mixed": 4}
    assert found["overall"] == 6.25
    assert found["tasks"]["speech_QA"] == 6
    assert found["n"] == 10
    assert found["states"] == {"scored": 8, "invalid": 0, "refused": 0, "inconsistent": 1, "missing": 1}
    assert found["tasks_missing"] == ["music_generation_analysis_QA", "sound_generation_QA"]
    # Worst case: sound (7 + 1) / 2 = 4, music (9 + 1) / 2 = 5.
    assert found["worst_case"]["categories"] == {"speech": 5, "sound": 4, "music": 5, "mixed": 4}
    assert found["worst_case"]["overall"] == 4.5
    json.dumps(found)


def test_weights_are_those_of_the_table():
    assert weights(SETS)["overall"] == {
        **{"speech": 0.25, "sound": 0.25, "music": 0.25},
        **{"speech_and_sound_QA": 0.125, "speech_and_music_QA": 0.125},
    }
    assert weights(["sound_QA", "speech_and_music_QA"]) == {
        "sound": {"sound": 1},
        "mixed": {"speech_and_music_QA": 1},
        "overall": {"sound": 0.5, "speech_and_music_QA": 0.5},
    }


def test_ratings_of_unknown_or_twice_rated_items_are_refused():
    items = items_of("sound_QA")
    with pytest.raises(ValueError, match="rating of '5', which is none of the 1 items"):
        as_scores(items, [scored("5", 3.0)])
    with pytest.raises(ValueError, match="'0' is rated twice"):
        as_scores(items, [scored("0", 3.0), scored("0", 4.0)])
