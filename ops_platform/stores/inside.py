"""Run inside a sandbox's own network: starts servers there, and hands one of their ports out over a unix socket.

Called as a file, with the standard library alone: `python inside.py SPEC`, SPEC a JSON file with `commands` (a list of argument
lists), `port` (on the loopback in there), `tls` (whether it speaks TLS; we do not, the socket is ours alone) and `socket`.
"""

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading


def carry(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def serve(client: socket.socket, port: int, tls: bool) -> None:
    try:
        server = socket.create_connection(("127.0.0.1", port), timeout=30)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE  # in this network there is nobody else
            server = context.wrap_socket(server)
        server.settimeout(None)
    except OSError:
        client.close()
        return
    threading.Thread(target=carry, args=(client, server), daemon=True).start()
    carry(server, client)


def main() -> None:
    with open(sys.argv[1]) as file:  # noqa: PTH123 - it begins with next to nothing
        spec = json.load(file)
    children = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for command in spec["commands"]]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(spec["socket"])
    os.chmod(spec["socket"], 0o600)  # noqa: PTH101
    listener.listen(64)

    def watch(child: "subprocess.Popen[bytes]") -> None:
        child.wait()
        os._exit(1)  # one that ends takes the others with it

    for child in children:
        threading.Thread(target=watch, args=(child,), daemon=True).start()
    while True:
        client, _ = listener.accept()
        threading.Thread(target=serve, args=(client, spec["port"], spec["tls"]), daemon=True).start()


if __name__ == "__main__":
    main()
