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

    On CUDA, what a GPU computes takes less time than Python needs to launch it, for all but large
    inputs. So the launches are recorded once, as a CUDA graph, and replayed. A function that
    cannot be recorded is called as it is.
    """

    def __init__(self, function: Callable[[], object], device: torch.device):
        self.device = device
        self.run = function
        self.replays_graph = False
        self.num_calls = 1
        if device.type == "cuda":
            self._record(function)
            seconds = hardware.seconds_per_call(self.run, device, 1)
            self.num_calls = max(1, min(MAX_CALLS, round(SECONDS_ON_CUDA / seconds)))

    def _record(self, function: Callable[[], object]) -> None:
        try:
            graph = record_graph(function)
        except Exception as error:  # whatever cannot be recorded, such as another graph
            utils.warn(f"timed as calls, as no CUDA graph can be made: {utils.first_line(error)}")
            torch.cuda.synchronize(self.device)
            return
        self.run = graph.replay
        self.replays_graph = True

    def __call__(self) -> float:
        return hardware.seconds_per_call(self.run, self.device, self.num_calls)


def record_graph(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The work that a function gives to the GPU, to be replayed."""
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
