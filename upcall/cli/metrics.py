"""`upcall metrics`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from upcall.cli import output
from upcall.cli.parameter_types import runtime_option
from upcall.core.errors import UsageError


@click.command("metrics")
@runtime_option()
@click.option("--per-uid", is_flag=True, help="Also the metrics of each registered uid.")
@click.option(
    "--textfile",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write them to this file, atomically, for node_exporter's textfile collector.",
)
@click.option(
    "--listen",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="",
    help="Serve them until SIGINT or SIGTERM: at unix:PATH, or without ADDRESS at metrics.sock in the broker's "
    "folder, mode 0660. HOST:PORT (127.0.0.1:9105) is TCP: every user of this machine can read root's view then.",
)
@click.option("--group", help="The group that may read the socket, by name or gid; without it this process's own.")
def command(runtime: Path | None, per_uid: bool, textfile: Path | None, listen: str | None, group: str | None) -> None:
    """Print the broker's metrics for Prometheus: once, to a file, or on each HTTP request.

    Root, and the owner of the broker's process, get the figures of all users, other users their own. If the broker
    does not answer, upcall_up is 0.

    \b
    Exit codes: 0 printed, written, or served until stopped; 64 prometheus_client is not installed, or a bad
    address.

    \b
    Examples:
      # upcall metrics
      # upcall metrics --textfile /var/lib/node_exporter/upcall.prom
      # upcall metrics --listen unix:/run/upcall/metrics.sock --group prometheus
    """
    if importlib.util.find_spec("prometheus_client") is None:
        raise UsageError("prometheus_client is not installed: pip install 'upcall[metrics]'")
    if textfile is not None and listen is not None:
        raise UsageError("--textfile or --listen, not both")
    from prometheus_client import generate_latest, make_wsgi_app, write_to_textfile

    from upcall.observe.metrics import asker, registry
    from upcall.process.paths import find_place

    figures = registry(asker(runtime), per_uid)
    if textfile is not None:
        write_to_textfile(str(textfile), figures)
    elif listen is not None:
        _serve(listen or f"unix:{find_place(runtime).folder / 'metrics.sock'}", make_wsgi_app(figures), group)
    else:
        click.echo(generate_latest(figures).decode(), nl=False)


def _gid(group: str | None) -> int | None:
    import grp

    if group is None or (group.isascii() and group.isdigit()):
        return None if group is None else int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise UsageError(f"there is no group {group!r}") from None


def _serve(address: str, app: object, group: str | None) -> None:
    import signal
    import threading

    from upcall.observe.metrics_server import server

    if not address.startswith("unix:") and group is not None:
        raise UsageError("--group is for a UNIX socket; every user can connect to a TCP port")
    with server(address, app, _gid(group)) as serving:  # type: ignore[arg-type]
        if not address.startswith("unix:"):
            output.note(f"every user of this machine can read the figures at {address}; --listen unix:PATH has a mode")
        for number in (signal.SIGINT, signal.SIGTERM):
            # shutdown() waits for the loop's end: called in the loop's own thread, it would never return
            signal.signal(number, lambda *_: threading.Thread(target=serving.shutdown).start())
        serving.serve_forever()
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)
