"""The onnx engine: an encoder as an ONNX graph in onnxruntime, on a CPU in float32."""

import os
import threading
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from models.engines.engine import EngineError, Pixels, Rows
from models.engines.runtime import onnxruntime
from models.engines.trace import PIXELS, ROWS

ELSEWHERE = "encoder.safetensors"


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Session options with a limit on threads. By default onnxruntime starts a thread for every core of the host."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Let idle threads sleep: if they spin, they take the cores from decoding and from the event loop.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


class OnnxEngine:
    """An onnxruntime session on `threads` threads, the caller's included.

    model: the bytes of an ONNX file from `pixels` (n, c, h, w) uint8 to `rows` (n, d) float32. weights: its external
    data, by the initializers' names. They are passed in memory, so that onnxruntime opens no file, whatever path the
    model names. Raises EngineError if onnxruntime refuses the model.
    """

    name = "onnx"

    def __init__(self, model: bytes, weights: Mapping[str, Tensor], threads: int) -> None:
        options = session_options(threads)
        arrays = [onnxruntime.OrtValue.ortvalue_from_numpy(it.detach().contiguous().numpy()) for it in weights.values()]
        options.add_external_initializers(list(weights), arrays)
        # onnxruntime would look for other weights in the working directory. Point it to an empty place instead.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            raise EngineError(f"onnxruntime refuses the graph: {str(error).strip()}") from error

    def __call__(self, pixels: Pixels) -> Rows:
        return self._run(pixels, None)

    def within(self, seconds: float, pixels: Pixels) -> Rows:
        """Do as a call does, but end it after so many seconds: a stranger's graph may hold a loop without end.

        Raises EngineError then.
        """
        options = onnxruntime.RunOptions()
        alarm = threading.Timer(seconds, setattr, (options, "terminate", True))
        alarm.daemon = True
        alarm.start()
        try:
            return self._run(pixels, options)
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            if options.terminate:
                raise EngineError(
                    f"the graph did not answer for {len(pixels)} images in {seconds:g} seconds"
                ) from error
            raise
        finally:
            alarm.cancel()

    def _run(self, pixels: Pixels, options: onnxruntime.RunOptions | None) -> Rows:
        rows: Rows = self._session.run([ROWS], {PIXELS: np.ascontiguousarray(pixels)}, options)[0]
        return rows

    def record(self) -> None:
        """Do nothing: the session is ready."""
