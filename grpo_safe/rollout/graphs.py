"""CUDA graphs of decoding steps: warmed up as real steps, captured once per shape, replayed from then on.

What PyTorch's notes on CUDA graphs demand, and where it stands here:
- some iterations on a side stream before the capture: the first WARM_UPS steps of a shape run there, and their results count;
- nothing that waits for the device, no memory that moves, no shape that changes: static.State and StaticCache see to it, and the last warm-up
  runs in PyTorch's mode that raises where something waits, as a capture that breaks leaves the allocator unable to give memory back;
- graphs that share a memory pool never run at once and keep no output in it: everything a step gives is copied into the state;
- no random numbers in the graph: the noise of a rollout is drawn before it.

A capture adds no work to the stream, so a step that is captured still has to be replayed to happen.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

WARM_UPS = 2  # steps of each shape before its capture: the first use of a kernel may allocate a workspace or choose an algorithm
log = logging.getLogger(__name__)

Step = Callable[[], None]


class Recorder(Protocol):
    """What records on a device."""

    def warm_up(self, step: Step) -> None:
        """Run a step where it will be recorded."""
        ...

    def rehearse(self, step: Step) -> None:
        """The same; RuntimeError where the step does what cannot be recorded."""
        ...

    def record(self, step: Step) -> Step:
        """Record a step without running it; what is returned runs it. RuntimeError where the step cannot be recorded."""
        ...

    def forget(self) -> None:
        """The steps recorded so far will not run again: their memory may go."""
        ...


class Graphs:
    """A static.Runner: the steps of a shape are recorded after WARM_UPS of them, and repeated."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.failure: str | None = None  # why recording was given up
        self._recorded: dict[Hashable, Step] = {}
        self._seen: Counter[Hashable] = Counter()

    def __call__(self, shape: Hashable, step: Step) -> None:
        if shape in self._recorded:
            return self._recorded[shape]()
        self._seen[shape] += 1
        if self.failure is None and self._seen[shape] == WARM_UPS:
            if self._tried(lambda: self.recorder.rehearse(step)):
                return None
        elif self.failure is None and self._seen[shape] > WARM_UPS and self._tried(lambda: self._record(shape, step)):
            return self._recorded[shape]()
        return self.recorder.warm_up(step)

    def forget(self) -> None:
        """Every graph reads fixed addresses: once one has changed, all are made anew."""
        self.recorder.forget()
        self._recorded.clear()
        self._seen.clear()

    def _record(self, shape: Hashable, step: Step) -> None:
        self._recorded[shape] = self.recorder.record(step)

    def _tried(self, attempt: Step) -> bool:
        """False where the device refuses, said once. The step then starts over: until the model's forward has ended it has changed nothing
        that it does not write again."""
        try:
            attempt()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.failure = str(error).splitlines()[0]
            log.warning(
                "rollout.cuda_graphs: a decoding step cannot be captured (%s); sampling goes on without graphs", self.failure
            )
            return False
        return True


class Cuda:
    """Records as CUDA graphs, all on one side stream and in one memory pool."""

    def __init__(self) -> None:
        self._stream: Any = None
        self._pool: Any = None

    def warm_up(self, step: Step) -> None:
        current, side = torch.cuda.current_stream(), self._side()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                step()
        finally:
            current.wait_stream(side)

    def rehearse(self, step: Step) -> None:
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():  # that the mode is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            self.warm_up(step)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def record(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # thread_local: threads beside this one (of NCCL, of a data loader) may use the device meanwhile. The outer context puts the
        # stream back also where torch.cuda.graph fails to, because ending a broken capture raises
        with (
            torch.cuda.stream(self._side()),
            torch.cuda.graph(graph, pool=self._pool, stream=self._side(), capture_error_mode="thread_local"),
        ):
            step()
        return graph.replay

    def forget(self) -> None:
        if self._pool is not None:
            torch.cuda.synchronize()  # none may be running when it is destroyed, which the caller does next
        self._pool = None

    def _side(self) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream
