"""What psycopg sends arrives: each string, by each of its cursors and each way to push, and looked at in each way.

push.py URL SCHEMA
"""

import json
import os
import sys
import uuid

import psycopg
from psycopg.types.json import Jsonb

url, schema = sys.argv[1:]
with open(os.path.join(os.path.dirname(__file__), "strings.json"), encoding="utf-8") as file:
    strings = json.load(file)
values = [{"path": "C:\\dir", "lines": "a\nb"}, ["\\x41", 1, None], "\\x41", "", 42, True]
blobs = [b"", b"\\x41", bytes(range(256))]


def expect(what, is_, should):
    if is_ != should:
        sys.exit(f"{what}: {is_!r} instead of {should!r}")


def drain(db, column):
    """All that is ready: looked at, popped and completed."""
    shown = db.execute(f"select {column} from {schema}.peek('t', 1000)").fetchall()
    rows = db.execute(f"select id, token, {column}, payload from {schema}.pop('t', 1000)").fetchall()
    for id, token, value, _ in rows:
        found = db.execute(f"select {column} from {schema}.find('t', %s)", [id]).fetchone()
        expect("find", found, (value,))
        db.execute(f"select {schema}.complete('t', %s, %s)", [id, token])
    expect("peek", [row[0] for row in shown], [row[2] for row in rows])
    return [row[2] for row in rows]


def each(db, values, cast=""):
    for value in values:
        db.execute(f"select {schema}.push('t', %s{cast})", [value])
        db.execute(f"select {schema}.push(topic => 't', payload => %s{cast}, delay => 0, headers => %s)", [value, '{"a": "b"}'])


def many(db, values, cast):
    db.execute(f"select {schema}.push_many('t', %s, %s{cast})", [[uuid.uuid4() for _ in values], values])


def refused(db, sql, arguments):
    try:
        db.execute(sql, arguments)
    except psycopg.Error:
        return
    sys.exit(f"{sql} with {arguments!r}: accepted")


for cursor in (psycopg.Cursor, psycopg.ClientCursor):
    with psycopg.connect(url, autocommit=True, cursor_factory=cursor) as db:
        for cast in ("", "::text"):
            each(db, strings, cast)
            expect("push of strings", drain(db, f"{schema}.as_text(payload)"), [s for s in strings for _ in range(2)])
        many(db, strings, "::text[]")
        expect("push_many of strings", drain(db, f"{schema}.as_text(payload)"), strings)
        each(db, [s.encode() for s in strings] + blobs)
        expect("push of bytes", drain(db, "payload"), [b for s in [s.encode() for s in strings] + blobs for b in (s, s)])
        many(db, blobs, "")
        expect("push_many of bytes", drain(db, "payload"), blobs)
        each(db, [Jsonb(value) for value in values])
        expect("push of JSON", drain(db, f"{schema}.as_json(payload)"), [v for v in values for _ in range(2)])
        many(db, [Jsonb(value) for value in values], "")
        expect("push_many of JSON", drain(db, f"{schema}.as_json(payload)"), values)
        each(db, blobs[2:])
        expect("what is no text", drain(db, f"{schema}.as_text(payload)"), [None, None])
        refused(db, f"select {schema}.push('t', %s)", ["nul\0"])
        refused(db, f"select {schema}.push('t', %s)", [42])
        refused(db, f"select {schema}.push('t', %s)", [None])
        refused(db, f"select {schema}.push_many('t', %s, %s)", [[uuid.uuid4()], ["\\x41"]])
        expect("what was refused", drain(db, "payload"), [])
