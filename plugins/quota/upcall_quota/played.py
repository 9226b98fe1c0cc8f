"""Runs misbehaving servers, and makes certificates, for tests."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

Behave = Callable[[socket.socket], None]


def serve_once(behave: Behave) -> int:
    """Starts a server that accepts one connection and passes it to `behave`. Returns its port on 127.0.0.1."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection:
                try:
                    behave(connection)
                except OSError:
                    return  # the client has closed the connection

    threading.Thread(target=run, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def stall(connection: socket.socket) -> None:
    """Reads everything and sends nothing."""
    while connection.recv(65536):
        pass


def close(connection: socket.socket) -> None:
    """Closes the connection without sending anything."""
    connection.recv(10)


def drip(words: bytes, again: bytes) -> Behave:
    """Sends `words`, then `again` every 50 ms without end: no single read takes long."""
    never = threading.Event()

    def behave(connection: socket.socket) -> None:
        connection.sendall(words)
        while not never.wait(0.05):
            connection.sendall(again)

    return behave


def say(words: bytes) -> Behave:
    """Sends `words`, whatever it receives."""

    def behave(connection: socket.socket) -> None:
        connection.sendall(words)
        stall(connection)

    return behave


def certificate(folder: Path) -> Path:
    """Makes a self-signed certificate for 127.0.0.1. Returns the file with certificate and key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - day).not_valid_after(now + day)
    made = (
        builder.add_extension(here, False).add_extension(x509.BasicConstraints(True, None), True).sign(key, SHA256())
    )
    path = folder / "server.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(made.public_bytes(Encoding.PEM) + private)
    return path
