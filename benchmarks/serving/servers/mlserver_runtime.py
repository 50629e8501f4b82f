"""MLServer: a custom runtime with adaptive batching, its protocol's JSON."""

from mlserver import MLModel  # type: ignore[import-not-found,unused-ignore]
from mlserver.codecs import NumpyCodec  # type: ignore[import-not-found,unused-ignore]
from mlserver.codecs.base64 import Base64Codec  # type: ignore[import-not-found,unused-ignore]
from mlserver.types import InferenceRequest, InferenceResponse  # type: ignore[import-not-found,unused-ignore]

from benchmarks.serving.workload import Workload


class Runtime(MLModel):  # type: ignore[misc,unused-ignore]
    async def load(self) -> bool:
        self.workload = Workload.from_environment()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = self.workload(Base64Codec.decode_input(payload.inputs[0]))
        output = NumpyCodec.encode_output("embedding", rows)
        return InferenceResponse(model_name=self.name, outputs=[output])
