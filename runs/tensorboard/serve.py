"""TensorBoard for one person, on a listening socket that the web server hands down. A program; no Django.

    python -I serve.py <log folder> <descriptor of the socket> <prefix of the address> <pid of the web server>

- It dies with the web server.
- Only plugins that read nothing but events are loaded. The projector would read any file that an event names, and
  plugins of other packages are unknown to us.
- One request a connection, each answer ends with the connection: the proxy needs no more of HTTP.
"""

from __future__ import annotations

import ctypes
import mimetypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

PR_SET_PDEATHSIG = 1
RELOAD_SECONDS = 5.0
FIRST_LOOK_SECONDS = 20.0  # then the page shows what was read until then
NICENESS = 10  # training comes first


def die_with(parent: int) -> None:
    """Be killed when the parent process ends; end now when it already has."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)


def plugins() -> list[Any]:
    """In the order of the tabs."""
    from tensorboard.plugins.core import core_plugin
    from tensorboard.plugins.custom_scalar import custom_scalars_plugin
    from tensorboard.plugins.distribution import distributions_plugin
    from tensorboard.plugins.histogram import histograms_plugin
    from tensorboard.plugins.hparams import hparams_plugin
    from tensorboard.plugins.image import images_plugin
    from tensorboard.plugins.metrics import metrics_plugin
    from tensorboard.plugins.scalar import scalars_plugin
    from tensorboard.plugins.text import text_plugin

    return [
        core_plugin.CorePluginLoader(),
        metrics_plugin.MetricsPlugin,
        scalars_plugin.ScalarsPlugin,
        custom_scalars_plugin.CustomScalarsPlugin,
        images_plugin.ImagesPlugin,
        distributions_plugin.DistributionsPlugin,
        histograms_plugin.HistogramsPlugin,
        text_plugin.TextPlugin,
        hparams_plugin.HParamsPlugin,
    ]


def with_own_fonts(application: Any, page: str) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
    """TensorBoard's page asks for its fonts at the root of the site, whatever its prefix: ours asks beside itself."""
    from werkzeug.wrappers import Response

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET" or environ["PATH_INFO"] != page:
            found: Iterable[bytes] = application(environ, start_response)
            return found
        response = Response.from_app(application, environ)
        response.set_data(response.get_data().replace(b"url(/font-roboto/", b"url(font-roboto/"))
        return response(environ, start_response)

    return answer


def look(board: Any, log_folder: str) -> None:
    """Read what there is. Without it the first page says that there is nothing, and stays so until it is reloaded."""
    events = board._ingester.deprecated_multiplexer
    events.AddRunsFromDirectory(log_folder)
    events.Reload()


def main(log_folder: str, descriptor: int, prefix: str, parent: int) -> None:
    die_with(parent)
    os.nice(NICENESS)
    from tensorboard import program
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.0"

        def log_request(self, *_: Any) -> None:
            """The log has errors only."""

    def server(application: Any, _flags: Any) -> Any:
        answer = with_own_fonts(application, f"{prefix}/")
        return make_server("unix://handed-down", 0, answer, threaded=True, request_handler=Handler, fd=descriptor)

    mimetypes.add_type("font/woff2", ".woff2")
    board = program.TensorBoard(plugins=plugins(), server_class=server)
    board.configure(logdir=log_folder, path_prefix=prefix, load_fast="false", reload_interval=RELOAD_SECONDS)
    listening = board._make_server()
    first_look = threading.Thread(target=look, args=(board, log_folder), daemon=True)
    first_look.start()
    first_look.join(FIRST_LOOK_SECONDS)
    listening.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
