"""Just enough of PostgreSQL's protocol to hold a thousand sessions from one thread."""

import socket
import struct
import time


class ServerError(Exception):
    """An ErrorResponse, or the end of the stream."""


class Session:
    """One logged-in connection; trust only."""

    def __init__(self, address, user, database, timeout=60):
        kind = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(kind)
        self.socket.settimeout(timeout)
        self.socket.connect(address)
        if kind == socket.AF_INET:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pending = b""
        self.started, self.worst = 0.0, 0.0
        body = f"user\0{user}\0database\0{database}\0\0".encode()
        self.socket.sendall(struct.pack("!II", len(body) + 8, 196608) + body)
        self.ready()

    def send(self, sql):
        body = sql.encode() + b"\0"
        self.socket.sendall(b"Q" + struct.pack("!I", len(body) + 4) + body)

    def ready(self):
        """Reads up to ReadyForQuery; returns the text of the first value of the last row."""
        value, error = None, None
        while True:
            while len(self.pending) < 5:
                self.fill()
            tag = self.pending[:1]
            length = struct.unpack("!I", self.pending[1:5])[0]
            while len(self.pending) < length + 1:
                self.fill()
            body, self.pending = self.pending[5 : length + 1], self.pending[length + 1 :]
            if tag == b"E":
                error = body.replace(b"\0", b" ").decode(errors="replace")
            elif tag == b"R" and body[:4] != b"\0\0\0\0":
                raise ServerError("the server asks for a password")
            elif tag == b"D" and body[2:6] != b"\xff\xff\xff\xff":
                size = struct.unpack("!I", body[2:6])[0]
                value = body[6 : 6 + size].decode()
            elif tag == b"Z":
                if error:
                    raise ServerError(error)
                return value
            if tag == b"E" and "VFATAL" in error:
                raise ServerError(error)

    def fill(self):
        piece = self.socket.recv(65536)
        if not piece:
            raise ServerError("connection closed")
        self.pending += piece

    def query(self, sql):
        self.send(sql)
        return self.ready()

    def close(self):
        self.socket.close()
