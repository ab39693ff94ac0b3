// Reads a disk as Xen Orchestra does: logs in, asks for the disk's block
// devices, reads blocks over TLS with one connection and then with several,
// and compares them with a file.
//
//   node read.mjs https://HOST:PORT PASSWORD UUID FILE
//
// package.json replaces the versions of two dependencies of the client, which
// cannot be had, by the newest that can: xen-api, which this script uses and the
// client does not, and async-map.
import assert from 'node:assert/strict'
import { readFile } from 'node:fs/promises'
import { createClient } from 'xen-api'
import NbdClient from '@vates/nbd-client'
import MultiNbdClient from '@vates/nbd-client/multi.mjs'

const [url, password, uuid, file] = process.argv.slice(2)
const want = await readFile(file)
assert.notEqual(want.length % (4 << 20), 0, 'a last block is to be short')

const xapi = createClient({ url, auth: { user: 'root', password }, allowUnauthorized: true, watchEvents: false })
await xapi.connect()
const infos = await xapi.call('VDI.get_nbd_info', await xapi.call('VDI.get_by_uuid', uuid))
assert.notEqual(infos.length, 0, 'there is no block device')
for (const { address, cert, exportname, port } of infos) {
  assert.ok(address && port && exportname && cert.includes('BEGIN CERTIFICATE'))
}

const once = { connectTimeout: 20e3, messageTimeout: 20e3, readBlockRetries: 1, reconnectRetry: 1 }
for (const [client, blockSize] of [
  [new NbdClient(infos[0], once), 2 << 20],
  [new MultiNbdClient(infos, { nbdConcurrency: 4, readAhead: 8, ...once }), 4 << 20],
]) {
  await client.connect()
  assert.equal(client.exportSize, BigInt(want.length))
  const blocks = await Promise.all(
    Array.from({ length: Math.ceil(want.length / blockSize) }, (_, i) => client.readBlock(i, blockSize))
  )
  assert.ok(Buffer.concat(blocks).equals(want), 'the blocks differ from the file')
  await client.disconnect()
  console.log(`${client.constructor.name}: ${blocks.length} blocks`)
}
await xapi.disconnect()
