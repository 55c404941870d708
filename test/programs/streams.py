# SPDX-License-Identifier: Apache-2.0
"""`streams.py server ADDRESS PORT` answers each message with the SHA-256 of all that came before on its connection and
the message itself. `streams.py client ADDRESS PORT` has eight connections, compares every answer, and goes on until its
input ends."""

import asyncio
import hashlib
import json
import random
import struct
import sys

CONNECTIONS = 8
LENGTH = struct.Struct("!I")


async def receive(reader):
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    return await reader.readexactly(length)


async def answer(reader, writer):
    digest = hashlib.sha256()
    try:
        while True:
            message = await receive(reader)
            digest.update(message)
            writer.write(digest.digest() + message)
            await writer.drain()
    except asyncio.IncompleteReadError as end:
        if end.partial:
            raise
        writer.close()


async def ask(number, address, ended):
    chance = random.Random(number)
    reader, writer = await asyncio.open_connection(*address)
    digest = hashlib.sha256()
    messages = 0
    while not ended.is_set():
        message = chance.randbytes(chance.randrange(200_000))
        digest.update(message)
        writer.write(LENGTH.pack(len(message)) + message)
        received = await reader.readexactly(32 + len(message))
        if received != digest.digest() + message:
            sys.exit(f"answer {messages} on connection {number} is wrong")
        messages += 1
    writer.close()
    await writer.wait_closed()
    return messages


async def main(role, host, port):
    if role == "server":
        server = await asyncio.start_server(answer, host, port)
        await server.serve_forever()
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, lambda: sys.stdin.buffer.read1() or ended.set())
    asked = await asyncio.gather(*(ask(number, (host, port), ended) for number in range(CONNECTIONS)))
    print(json.dumps({"connections": CONNECTIONS, "requests": sum(asked)}))


asyncio.run(main(*sys.argv[1:]))
