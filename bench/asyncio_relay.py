"""The relay that a Python programmer writes in ten minutes: asyncio streams, 64 KiB at a time.

python asyncio_relay.py PORT BACKEND_PORT [LOG]
"""

from __future__ import annotations

import asyncio
import sys
import time

CHUNK = 65536


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    """Pass on one direction, its end included. Returns how many bytes it was."""
    total = 0
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
        total += len(data)
    writer.write_eof()
    return total


async def main(port: int, backend: int, log: str | None) -> None:
    """Serve until the process is ended."""
    output = open(log, "a", buffering=1) if log else None  # noqa: SIM115, it is open until the process ends

    async def handle(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        began = time.monotonic()
        host, client_port = to_client.get_extra_info("peername")
        reader, writer = await asyncio.open_connection("127.0.0.1", backend)
        try:
            sent, received = await asyncio.gather(pump(client, writer), pump(reader, to_client))
        except OSError:
            return
        finally:
            writer.close()
            to_client.close()
        if output:
            seconds = time.monotonic() - began
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            output.write(
                f"{stamp} client={host}:{client_port} backend=127.0.0.1:{backend} sent={sent} received={received} "
                f"seconds={seconds:.3f}\n"
            )

    server = await asyncio.start_server(handle, "127.0.0.1", port, limit=CHUNK, backlog=128)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None))
