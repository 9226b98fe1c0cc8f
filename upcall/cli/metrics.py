"""`upcall metrics`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from upcall.errors import UsageError


@click.command("metrics")
@click.option("--runtime", type=click.Path(file_okay=False, path_type=Path), help="The broker's folder.")
@click.option("--per-uid", is_flag=True, help="Figures of each registered uid, too.")
@click.option(
    "--textfile",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write them to this file, at once or not at all, for node_exporter's textfile collector.",
)
@click.option(
    "--listen",
    metavar="ADDRESS",
    help="Serve them at unix:PATH, or at this machine's own 127.0.0.1:PORT, until SIGINT or SIGTERM.",
)
def command(runtime: Path | None, per_uid: bool, textfile: Path | None, listen: str | None) -> None:
    """Print the broker's figures for Prometheus: once, to a file, or whenever they are asked for.

    The broker tells root of everybody, and others of themselves. If it does not answer, upcall_up is 0.

    \b
    Exit codes: 0 printed, written, or served until told to end; 64 prometheus_client is not installed, or a bad
    address.

    \b
    Examples:
      # upcall metrics
      # upcall metrics --textfile /var/lib/node_exporter/upcall.prom
      # upcall metrics --listen 127.0.0.1:9105
    """
    if importlib.util.find_spec("prometheus_client") is None:
        raise UsageError("prometheus_client is not installed: pip install 'upcall[metrics]'")
    if textfile is not None and listen is not None:
        raise UsageError("--textfile or --listen, not both")
    from prometheus_client import generate_latest, make_wsgi_app, write_to_textfile

    from upcall.metrics import asker, registry

    figures = registry(asker(runtime), per_uid)
    if textfile is not None:
        write_to_textfile(str(textfile), figures)
    elif listen is not None:
        _serve(listen, make_wsgi_app(figures))
    else:
        click.echo(generate_latest(figures).decode(), nl=False)


def _serve(address: str, app: object) -> None:
    import signal
    import threading

    from upcall.metricsserver import server

    with server(address, app) as serving:  # type: ignore[arg-type]
        for number in (signal.SIGINT, signal.SIGTERM):
            # shutdown() waits for the loop's end, which a handler in the loop's own thread would hold up for ever
            signal.signal(number, lambda *_: threading.Thread(target=serving.shutdown).start())
        serving.serve_forever()
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)
