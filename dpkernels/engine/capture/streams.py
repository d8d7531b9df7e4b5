"""CUDA streams of one backward pass, and which must wait for which.

PyTorch runs the backward of a layer on the stream of the layer's forward. Callbacks at the end of
the backward pass run on the stream from which ``backward()`` was called, provided that a leaf on
the GPU took part: the anchor's (:meth:`dpkernels.engine.capture.session.Session.place_anchor`).
Norms formed on one stream are read on another, and memory freed on one stream is taken again on
another, so both wait.
"""

from __future__ import annotations

import torch


class Streams:
    """The streams of one backward pass, by device; without a GPU there is nothing to do."""

    def __init__(self) -> None:
        #: by device: the streams on which contributions were formed, in order
        self._worked: dict[torch.device, dict[torch.cuda.Stream, None]] = {}
        #: by device: an event recorded when the last backward pass' gradients were complete
        self._complete: dict[torch.device, torch.cuda.Event] = {}

    def note(self, device: torch.device) -> None:
        """A contribution is formed on the current stream of this device."""
        if device.type == "cuda":
            self._worked.setdefault(device, {})[torch.cuda.current_stream(device)] = None

    def gather(self) -> None:
        """Let the current stream of every device wait for all streams that were noted.

        The current stream also waits for the sums of the backward passes before.
        """
        self.wait()
        for device, streams in self._worked.items():
            current = torch.cuda.current_stream(device)
            for stream in streams:
                if stream != current:
                    current.wait_stream(stream)

    def complete(self) -> None:
        """The current streams have read all contributions: noted streams wait and are forgotten.

        A stream may take the memory of contributions again only after they were read.
        """
        for device, streams in self._worked.items():
            current = torch.cuda.current_stream(device)
            self._complete[device] = event = current.record_event()
            for stream in streams:
                if stream != current:
                    stream.wait_event(event)
        self._worked.clear()

    @property
    def several(self) -> bool:
        """Whether contributions were formed on another stream than the current one.

        The memory of contributions must then be kept until :meth:`complete`: their own stream would
        take memory freed before again, while the current stream still reads.
        """
        return any(
            stream != torch.cuda.current_stream(device)
            for device, streams in self._worked.items()
            for stream in streams
        )

    def forget(self) -> None:
        """Forget the streams of a backward pass that failed half-way."""
        self._worked.clear()

    def wait(self) -> None:
        """Let the current streams wait until the gradients of the last backward pass are complete.

        A step on another stream than the stream of ``backward()`` needs this.
        """
        for device, event in self._complete.items():
            torch.cuda.current_stream(device).wait_event(event)


def refuse_graph_capture(what: str) -> None:
    """Raise where a CUDA graph is being captured: its replay would repeat the noise.

    Args:
        what: what was called, for the message.

    Raises:
        RuntimeError: the current stream is capturing.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what}: a CUDA graph is being captured. Every replay would add the same noise again, "
            "as its key and counter are arguments of the captured kernels, so nothing would be "
            "private. Run private training steps outside torch.cuda.graph and without "
            "make_graphed_callables (torch.compile works between the layers)"
        )
