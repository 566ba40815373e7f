"""How long a forward and backward pass takes on a device."""

from __future__ import annotations

from collections.abc import Callable

import torch

import utils
from runtime import hardware

TIMES_ARE = {
    "cuda": "of a CUDA graph that is replayed, between events on the GPU, so without launches from "
    "Python; call_milliseconds are of one call, launches included; where replays_graph is false, "
    "both are of calls",
    "cpu": "of one call",
    "mps": "of one call, until the device has finished",
}

# On CUDA, a measurement lasts about as long as this, as events are not exact to a microsecond.
SECONDS_ON_CUDA = 0.01
MAX_CALLS = 50
WARM_UP_CALLS = 3  # before a graph is recorded: workspaces, kernels


class Timer:
    """Times one function again and again: call it for the seconds of one run.

    On CUDA the mean of several runs, elsewhere one run.
    """

    def __init__(
        self,
        function: Callable[[], object],
        device: torch.device,
        graph: torch.cuda.CUDAGraph | None = None,
    ):
        self.run = function if graph is None else graph.replay
        self.replays_graph = graph is not None
        self.device = device
        self.num_calls = 1
        if device.type == "cuda":
            self()  # a graph is uploaded at its first replay
            self.num_calls = round(SECONDS_ON_CUDA / max(self(), 1e-9))
            self.num_calls = max(1, min(MAX_CALLS, self.num_calls))

    def __call__(self) -> float:
        return hardware.seconds_per_call(self.run, self.device, self.num_calls)


def timers_of(functions: dict[str, Callable[[], object]], device: torch.device) -> dict[str, Timer]:
    """A timer for each function, by name.

    What a GPU computes takes less time than Python needs to launch it, for all but large inputs. So
    on CUDA the launches are recorded once, as a CUDA graph, and replayed. If one function cannot
    be recorded, such as one that replays a graph itself, then all are timed as calls, because they
    are compared with each other.

    Raises torch.OutOfMemoryError if the graphs do not fit: each keeps its memory.
    """
    graphs = dict.fromkeys(functions)
    if device.type == "cuda":
        for name, function in functions.items():
            try:
                graphs[name] = record_graph(function)
            except Exception as error:  # whatever cannot be recorded
                if utils.says_no_memory(error):
                    raise
                reason = utils.first_line(error)
                utils.warn(f"all are timed as calls, as {name} makes no CUDA graph: {reason}")
                torch.cuda.synchronize()
                graphs = dict.fromkeys(functions)
                break
    return {name: Timer(functions[name], device, graphs[name]) for name in functions}


def record_graph(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The work that a function gives to the current GPU, to be replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a graph is recorded on a stream of its own
        for _ in range(WARM_UP_CALLS):
            function()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph
