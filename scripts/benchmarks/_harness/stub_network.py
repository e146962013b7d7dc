"""Run a command in this process with one method timed; predict.py measures the network of either side with it.

usage: python scripts/benchmarks/stub_network.py MODULE:CLASS.METHOD MODULE:COMMAND ARGUMENTS...

Nothing heavy is imported here, since processes spawned by the command import this file again.
"""

import importlib
import sys
import time

SECONDS_PREFIX = "seconds in the method:"


def main() -> None:
    """Patch the method, run the command, print its seconds and processor seconds."""
    (method_module, method), (command_module, command) = (word.split(":") for word in sys.argv[1:3])
    del sys.argv[1:3]
    owner, name = method.split(".")
    place = getattr(importlib.import_module(method_module), owner)
    function, spent = getattr(place, name), [0.0, 0.0]

    def timed(*args, **kwargs):
        started = time.perf_counter(), time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - started[0]
            spent[1] += time.process_time() - started[1]

    setattr(place, name, timed)
    try:
        getattr(importlib.import_module(command_module), command)()
    finally:
        print(SECONDS_PREFIX, *(round(seconds, 3) for seconds in spent))


if __name__ == "__main__":
    main()
