"""Run llama.cpp's own HTTP server out of the wheel `xllamacpp`, in the foreground.

    python tests/llamacpp_server.py -m model.gguf --mmproj model-mmproj.gguf --port 8080

Says "serving http://..." once it listens; stops at Ctrl-C or SIGTERM without waiting for requests.
"""

import argparse
import os
import signal
import threading

import xllamacpp


def parameters(options: argparse.Namespace) -> xllamacpp.CommonParams:
    """Translate the command line to llama.cpp's own settings."""
    params = xllamacpp.CommonParams()
    params.model.path = options.model
    if options.mmproj:
        params.mmproj.path = options.mmproj
    params.hostnames = [options.host]
    params.port = options.port
    params.n_ctx = options.ctx
    params.n_parallel = options.parallel
    if options.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    if options.alias:
        params.model_alias = {options.alias}
    params.api_keys = options.api_key
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--mmproj", help="vision projector; without it only text is understood")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument("-c", "--ctx", type=int, default=8192, help="tokens, shared by all slots")
    parser.add_argument("-np", "--parallel", type=int, default=4, help="slots")
    parser.add_argument("-t", "--threads", type=int, help="1 is best for the tiny model")
    parser.add_argument("--api-key", action="append", default=[])
    parser.add_argument("--alias", help="the model's name in answers")
    options = parser.parse_args()

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server = xllamacpp.Server(parameters(options))
    print(f"serving {server.listening_address}", flush=True)
    stop.wait()
    os._exit(0)  # the server's own end would wait for answers still being written


if __name__ == "__main__":
    main()
