// What node's pg sends arrives: each string, by each way to push, and looked at in each way.
//
// push.cjs URL SCHEMA

const assert = require('assert');
const { randomUUID } = require('crypto');
const { Client } = require('pg');

const [url, schema] = process.argv.slice(2);
const strings = require('./strings.json');
const objects = [{ path: 'C:\\dir', lines: 'a\nb' }, { list: ['\\x41', 1, null] }, {}];
const blobs = [Buffer.from(''), Buffer.from('\\x41'), Buffer.from([...Array(256).keys()])];
const twice = (values) => values.flatMap((value) => [value, value]);

async function main() {
  const db = new Client({ connectionString: url });
  await db.connect();

  // All that is ready: looked at, popped and completed.
  async function drain(column) {
    const shown = await db.query(`select ${column} as value from ${schema}.peek('t', 1000)`);
    const { rows } = await db.query(`select id, token, ${column} as value from ${schema}.pop('t', 1000)`);
    assert.deepStrictEqual(shown.rows.map((row) => row.value), rows.map((row) => row.value), 'peek');
    for (const { id, token, value } of rows) {
      const found = await db.query(`select ${column} as value from ${schema}.find('t', $1)`, [id]);
      assert.deepStrictEqual(found.rows[0].value, value, 'find');
      await db.query(`select ${schema}.complete('t', $1, $2)`, [id, token]);
    }
    return rows.map((row) => row.value);
  }

  async function each(values, cast = '') {
    for (const value of values) {
      await db.query(`select ${schema}.push('t', $1${cast})`, [value]);
      const named = `topic => 't', payload => $1${cast}, delay => 0, headers => $2`;
      await db.query(`select ${schema}.push(${named})`, [value, { a: 'b' }]);
    }
  }

  async function many(values, cast) {
    const ids = values.map(() => randomUUID());
    await db.query(`select ${schema}.push_many('t', $1, $2${cast})`, [ids, values]);
  }

  const asText = `${schema}.as_text(payload)`;
  const asJson = `${schema}.as_json(payload)`;
  for (const cast of ['', '::text']) {
    await each(strings, cast);
    assert.deepStrictEqual(await drain(asText), twice(strings), 'push of strings');
  }
  await many(strings, '::text[]');
  assert.deepStrictEqual(await drain(asText), strings, 'push_many of strings');
  await each(strings.map((text) => Buffer.from(text)));
  assert.deepStrictEqual(await drain(asText), twice(strings), 'push of bytes that are text');
  await each(blobs, '::bytea');
  assert.deepStrictEqual(await drain('payload'), twice(blobs), 'push of bytes');
  await many(blobs, '::bytea[]');
  assert.deepStrictEqual(await drain('payload'), blobs, 'push_many of bytes');
  for (const cast of ['', '::jsonb']) {
    await each(objects, cast);
    assert.deepStrictEqual(await drain(asJson), twice(objects), 'push of objects');
  }
  await many(objects.map((object) => JSON.stringify(object)), '::jsonb[]');
  assert.deepStrictEqual(await drain(asJson), objects, 'push_many of objects');

  for (const value of ['nul\0', blobs[2], null]) {
    await assert.rejects(db.query(`select ${schema}.push('t', $1)`, [value]));
  }
  await assert.rejects(db.query(`select ${schema}.push_many('t', $1, $2)`, [[randomUUID()], ['\\x41']]));
  assert.deepStrictEqual(await drain('payload'), [], 'what was refused');
  await db.end();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
