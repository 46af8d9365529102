// node-postgres: parameters, named prepared statements, a cursor, a pool.
'use strict'

const readline = require('node:readline')
const { Client, Pool } = require('pg')
const Cursor = require('pg-cursor')

function check(what, got, expected) {
  if (JSON.stringify(got) !== JSON.stringify(expected)) {
    throw new Error(`${what}: got ${JSON.stringify(got)}, expected ${JSON.stringify(expected)}`)
  }
}

const lines = readline.createInterface({ input: process.stdin })

function switchNow() {
  console.log('SWITCH')
  return new Promise((resolve, reject) => {
    lines.once('line', (line) => (line === 'GO' ? resolve() : reject(new Error(`got ${line}`))))
  })
}

async function transaction(client) {
  const text = 'insert into np (pos, v, n) values ($1, $2, $3) returning id'
  const seen = []
  const add = async (v, n) => {
    const pos = seen.length + 1
    const result = await client.query({ name: 'add', text, values: [pos, v, n] })
    seen.push({ pos, v, n, id: result.rows[0].id })
    return result
  }
  await client.query('begin isolation level repeatable read')
  check('first id', (await add('first', 1)).rows, [{ id: 1 }])
  for (let i = 0; i < 50; i++) await add(`row ${i}`, i)
  const cursor = client.query(new Cursor('select pos, id from np order by pos'))
  const place = ({ pos, id }) => ({ pos, id })
  check('before the move', await cursor.read(5), seen.slice(0, 5).map(place))
  await switchNow()
  check('after the move', await cursor.read(5), seen.slice(5, 10).map(place))
  await cursor.close()
  await add('second', 2)
  const sum = await client.query('select sum(n)::int as sum from np where id > $1', [0])
  check('sum inside the transaction', sum.rows, [{ sum: 1228 }])
  await client.query('commit')
  return seen
}

async function main() {
  const client = new Client()
  await client.connect()
  await client.query('drop table if exists np')
  await client.query('create table np (id serial primary key, pos int, v text unique, n int)')
  const seen = await transaction(client)
  await client.end()
  const pool = new Pool({ max: 4 })
  const counts = await Promise.all(
    [0, 1, 2, 3].map((r) => pool.query('select count(*)::int as c from np where id % 4 = $1', [r])),
  )
  check('rows', counts.reduce((sum, result) => sum + result.rows[0].c, 0), 52)
  // Every id was seen: all of them are what they were.
  check('table', (await pool.query('select pos, v, n, id from np order by pos')).rows, seen)
  await pool.query('drop table np')
  await pool.end()
  lines.close()
}

main().catch((error) => {
  console.error(error)
  process.exit(1)
})
