"""Full-text search in Argilla's own SQLite file: an FTS5 table that triggers keep in step with `records`.

The triggers run inside Argilla's own transactions, so the index is never stale and never half written,
whoever writes. They run in Argilla's connections, where no Python function is registered (a trigger that
called one would fail every insert there, and in the `sqlite3` shell): what is indexed is therefore worked
out in plain SQL.

Per record there is one text per field, and one, field "", of all together: a query that names no field may
find its words in different ones.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

EVERY_FIELD = ""
_BUSY_TIMEOUT_S = 30

# What `html.escape` makes, the other way round; "&amp;" comes last, or "&amp;lt;" would end as "<".
_ENTITIES = {"&#x27;": "''", "&quot;": '"', "&lt;": "<", "&gt;": ">", "&amp;": "&"}

# Documents have numbers of their own: FTS5 finds a row by an integer only, and the rowids of `records` change
# under VACUUM. No view: one over `records` would break the migrations that drop and rename that table.
_TABLES = {
    "search_documents": (
        "CREATE TABLE search_documents (number INTEGER PRIMARY KEY, record_id TEXT NOT NULL,"
        " field TEXT NOT NULL, UNIQUE (record_id, field))"
    ),
    "search_texts": (
        "CREATE VIRTUAL TABLE search_texts USING fts5(body, tokenize = 'unicode61 remove_diacritics 2')"
    ),
}


def _pieces(text: str, separator: str, first: str, other: str) -> str:
    """A SQL expression: `text` split at `separator`, each piece mapped by `first` or `other`, joined again.

    SQLite has neither regular expressions nor, within triggers, loops (WITH RECURSIVE). But a text as a JSON
    string, in which each separator is replaced by the end of one string and the start of the next, is a
    JSON array of the pieces: neither separator used here can be part of a JSON escape.
    """
    array = f"'[' || replace(json_quote({text}), '{separator}', '\",\"') || ']'"
    return (
        f"(SELECT group_concat(CASE WHEN piece.key = 0 THEN {first} ELSE {other} END, '')"
        f" FROM json_each({array}) AS piece)"
    )


def _plain(html: str) -> str:
    """A SQL expression for the text in the HTML that the SQL expression `html` gives.

    Fields hold `<p style="white-space:pre-wrap...">`, with most punctuation as `&#34;`. Were they indexed as
    they are, "white" and "34" would find every record, and the phrase "either/or" none.
    """
    text = _pieces(html, "<", "piece.value", "' ' || substr(piece.value, instr(piece.value, '>') + 1)")
    character = "char(CAST(piece.value AS INTEGER)) || substr(piece.value, instr(piece.value, ';') + 1)"
    other = f"CASE WHEN piece.value GLOB '[0-9]*;*' THEN {character} ELSE '&#' || piece.value END"
    text = _pieces(text, "&#", "piece.value", other)
    for entity, meaning in _ENTITIES.items():
        text = f"replace({text}, '{entity}', '{meaning}')"
    return text


def _index(records: str) -> str:
    """Statements that index the records of a FROM clause with columns `id` and `fields`.

    CROSS JOIN keeps SQLite from starting at any but the first table.
    """
    # json_tree: chat and custom fields hold their texts further in. A data URL is megabytes without a word.
    body = (
        f"(SELECT group_concat(leaf.body, ' ') FROM (SELECT {_plain('node.value')} AS body"
        " FROM json_tree(record.fields, field.fullkey) AS node WHERE node.type = 'text') AS leaf"
        " WHERE instr(leaf.body, ';base64,') = 0)"
    )
    return f"""
        INSERT INTO search_documents (record_id, field)
            SELECT record.id, '{EVERY_FIELD}' FROM {records} AS record
            UNION ALL
            SELECT record.id, field.key FROM {records} AS record CROSS JOIN json_each(record.fields) AS field
            WHERE field.key IS NOT NULL;
        INSERT INTO search_texts (rowid, body)
            SELECT document.number, {body}
            FROM {records} AS record CROSS JOIN json_each(record.fields) AS field
            CROSS JOIN search_documents AS document
                ON document.record_id = record.id AND document.field = field.key;
        INSERT INTO search_texts (rowid, body)
            SELECT whole.number, group_concat(text.body, ' ')
            FROM {records} AS record
            CROSS JOIN search_documents AS whole
                ON whole.record_id = record.id AND whole.field = '{EVERY_FIELD}'
            CROSS JOIN search_documents AS part
                ON part.record_id = record.id AND part.field <> '{EVERY_FIELD}'
            CROSS JOIN search_texts AS text ON text.rowid = part.number
            GROUP BY whole.number;"""


_INDEX_NEW = _index("(SELECT new.id AS id, new.fields AS fields)")
_FORGET_OLD = """
        DELETE FROM search_texts
            WHERE rowid IN (SELECT number FROM search_documents WHERE record_id = old.id);
        DELETE FROM search_documents WHERE record_id = old.id;"""

_TRIGGERS = {
    "search_insert": f"CREATE TRIGGER search_insert AFTER INSERT ON records BEGIN{_INDEX_NEW} END",
    "search_update": (
        "CREATE TRIGGER search_update AFTER UPDATE OF id, fields ON records"
        f" WHEN old.id IS NOT new.id OR old.fields IS NOT new.fields BEGIN{_FORGET_OLD}{_INDEX_NEW} END"
    ),
    "search_delete": f"CREATE TRIGGER search_delete AFTER DELETE ON records BEGIN{_FORGET_OLD} END",
}


def install(database: Path) -> bool:
    """Make the index and its triggers, or leave them where they are right; at each start, after migrations.

    A migration that changes `records` makes that table anew, without its triggers. What was written while
    they were missing cannot be told from what was not, so the index is then built again from all records.

    Returns:
        Whether it was built (again).

    Raises:
        sqlite3.Error: `database` cannot be written, or has no `records`.
    """
    with closing(sqlite3.connect(database, timeout=_BUSY_TIMEOUT_S, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")  # kept in the file: readers never wait for a writer
        if _is_right(db):
            return False
        drop = [f"DROP TRIGGER IF EXISTS {name};" for name in _TRIGGERS]
        drop += [f"DROP TABLE IF EXISTS {name};" for name in _TABLES]
        create = [f"{sql};" for sql in (*_TABLES.values(), *_TRIGGERS.values())]
        db.executescript("\n".join(["BEGIN IMMEDIATE;", *drop, *create, _index("records"), "COMMIT;"]))
    return True


def _is_right(db: sqlite3.Connection) -> bool:
    existing = dict(db.execute("SELECT name, sql FROM sqlite_schema WHERE name LIKE 'search~_%' ESCAPE '~'"))
    if any(existing.get(name) != sql for name, sql in (_TABLES | _TRIGGERS).items()):
        return False
    missing = "SELECT 1 FROM records WHERE id NOT IN (SELECT record_id FROM search_documents) LIMIT 1"
    left = "SELECT 1 FROM search_documents WHERE record_id NOT IN (SELECT id FROM records) LIMIT 1"
    return not db.execute(missing).fetchone() and not db.execute(left).fetchone()


class Match(NamedTuple):
    """FTS5 expressions: what must be in a text, and what must not; None for nothing."""

    wanted: str | None
    excluded: str | None


_MOST_PARTS = 200
_PART = re.compile(r'(?P<bar>\|)|(?P<minus>-?)(?:"(?P<phrase>[^"]*)"|(?P<word>[^\s"|]+))')


def match(query: str) -> Match:
    """What annotators type, as FTS5: words (all of them), "a phrase", one | other, -without, prefix*.

    "|" binds weaker than "and". Every word is quoted, so that FTS5's own syntax is never passed on:
    `a"b OR (x) NEAR(` would be an error in it, and is five words here. What comes after the first 200 parts
    is left out: to rank thousands of words takes minutes.
    """
    wanted: list[str] = []
    excluded: list[str] = []
    glue = " AND "
    for part in islice(_PART.finditer(query.replace("\0", " ")), _MOST_PARTS):
        if part["bar"]:
            glue = " OR "
            continue
        term = _term(part["phrase"], part["word"])
        if term is None:
            continue
        if part["minus"]:
            excluded.append(term)
        else:
            wanted += [glue, term] if wanted else [term]
        glue = " AND "
    return Match("".join(wanted) or None, " OR ".join(dict.fromkeys(excluded)) or None)


def _term(phrase: str | None, word: str | None) -> str | None:
    text = word if phrase is None else phrase
    if text is None or not any(character.isalnum() for character in text):
        return None  # no word to the tokenizer, and an empty string is an error to FTS5
    return f'"{text}"*' if word and word.endswith("*") else f'"{text}"'
