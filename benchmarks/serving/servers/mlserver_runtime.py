"""MLServer: a custom runtime with adaptive batching, its protocol's JSON."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.codecs.base64 import Base64Codec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.serving.workload import Workload


class Runtime(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        self.workload = Workload.from_environment()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = self.workload(Base64Codec.decode_input(payload.inputs[0]))
        output = NumpyCodec.encode_output("embedding", rows)
        return InferenceResponse(model_name=self.name, outputs=[output])
