"""OpenAPI schemas, with working examples, of the routes that watch traffic and change what is served."""

from typing import Any

from service.http.routes.schemas import BINARY, DATA_URI, ENCODER, KEY, Responses, example, failures, loose

_NUMBERS: dict[str, Any] = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
OBSERVE_BODY: dict[str, Any] = KEY | {
    "parameters": [
        {"name": "model", "in": "query", "schema": {"type": "string"}, "description": "With a binary body."}
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/x-npy": BINARY,
            "application/x-safetensors": BINARY,
            "application/vnd.apache.arrow.stream": BINARY,
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model"],
                    "properties": {
                        "model": {"type": "string"},
                        "rows": _NUMBERS | {"description": "Embeddings, one a row, normalised or not."},
                        "keys": {
                            "type": "array",
                            "items": {"type": ["string", "integer"]},
                            "description": "A content hash a row: one seen within the shortest window is a duplicate.",
                        },
                        "inputs": _NUMBERS | {"description": "A small descriptor of what was embedded, one a row."},
                        "canary": _NUMBERS | {"description": "What the reference's canary images embed to now."},
                    },
                },
                "example": {"model": "their-encoder", "rows": [[0.1, -0.2, 0.3], [0.0, 0.4, -0.1]]},
            },
        },
    },
}
OBSERVE_RESPONSES: Responses = {
    202: {
        "content": {
            "application/json": {"example": {"model": "their-encoder", "rows": 2, "watched": 2, "dimension": 3}}
        }
    },
    **failures(400, 401, 403, 408, 409, 413, 415, 422, 429),
}
REFERENCE_BODY: dict[str, Any] = KEY | {
    "requestBody": {"required": True, "content": {"application/x-safetensors": BINARY}},
}
REFERENCE_RESPONSES: Responses = example(
    {"model": "theirs", "dimension": 768, "rows": 5000, "calibrated": True, "inputs": True, "canary": 256}
) | failures(401, 403, 408, 409, 413, 422, 429)
METRICS = """# TYPE fullrank_effective_rank gauge
fullrank_effective_rank{model="fashion-byol",revision="26bac791d1d4",window="5m"} 42.8
"""
METRICS_RESPONSES: Responses = failures(401, 403) | {
    200: {
        "content": {
            "text/plain": {"schema": {"type": "string"}, "example": METRICS},
            "application/openmetrics-text": {"schema": {"type": "string"}},
        }
    }
}
MOMENTS_RESPONSES: Responses = {
    200: {"content": {"application/octet-stream": BINARY}},
    **failures(401, 403, 404, 422, 503),
}
HEALTHY = "variance, participation ratio and band profile are near the reference over 1792 rows"
SPECTRUM_RESPONSES: Responses = {
    **loose(
        ENCODER
        | {
            "compared_with": ENCODER,
            "timestamp": 1795320580.72,
            "dimension": 256,
            "verdict": {"state": "healthy", "reason": HEALTHY},
            "windows": {
                "300": {
                    "seconds": 300.0,
                    "rows": 1792,
                    "effective_rank": 42.8,
                    "participation_ratio": {"lower": 25.2, "estimate": 26.1, "upper": 27.7},
                    "total_variance": 0.37,
                }
            },
            "thresholds": {"effective_rank": 30.2, "canary_cosine": 0.99, "canary_angle": 1.97},
            "canary": {
                "cosine_min": 1.0,
                "angle_degrees": 0.0,
                "angle_median_degrees": 0.0,
                "neighbours_overlap": 1.0,
                "distance_correlation": 1.0,
                "participation_ratio": 26.7,
            },
            "measures": {
                "wasserstein_uniformity": 1.14,
                "rows": 511,
                "dead_units": 0,
                "saturated_units": 0,
                "hubness": 0.45,
                "local_dimension": {"lower": 5.8, "estimate": 6.5, "upper": 7.2},
                "gaussianity": 2.2,
                "copies_share": 0.0,
                "distinct_rows": 511,
                "shared_answers": 0.0,
                "input_correlation": {"lower": 0.55, "estimate": 0.58, "upper": 0.6},
            },
        }
    ),
    **failures(404, 422, 503),
}
_UPDATE = {
    "time": 1795320580.72,
    "until": 1795320575.1,
    "phase": "ready",
    "fault": None,
    "default": True,
    "fleet": False,
    "encoders": [
        ENCODER | {"observed": False, "watched": True, "gone": False, "state": "healthy", "reason": "", "rows": 9}
    ],
    "model": ENCODER["model"],
    "observed": False,
    "history": {
        "states": ["insufficient_data", "healthy"],
        "fields": ["effective_rank", "participation_ratio"],
        "ranks": [1, 2],
        "time": [1795320575.1],
        "state": [1],
        "figures": [[42.8, 26.1]],
        "spectrum": [[-1.2, -1.4]],
        "bands": [[0.01, -0.02]],
        "events": [{"time": 1795320560.1, "kind": "swap", "from": "a@26bac791d1d4", "to": "b@0123456789ab"}],
    },
    "traffic": {"fields": ["images_per_second"], "time": [1795320575.1], "figures": [[48.0]], "limit": 512},
}
HISTORY_RESPONSES: Responses = {**loose(_UPDATE), **failures(404, 422)}
EVENTS_RESPONSES: Responses = {
    200: {
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'event: update\ndata: {"phase": "ready"}\n\n',
            }
        }
    },
    **failures(404, 422, 429, 503),
}
NEIGHBOURS_BODY: dict[str, Any] = KEY | {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["embedding"],
                    "properties": {
                        "embedding": {"type": "array", "items": {"type": "number"}},
                        "model": {"type": "string"},
                        "count": {"type": "integer", "minimum": 1, "maximum": 32, "default": 6},
                    },
                },
                "example": {"embedding": [0.0625] * 256, "count": 2},
            }
        },
    }
}
NEIGHBOURS_RESPONSES: Responses = {
    **example(ENCODER | {"canary": 256, "neighbours": [{"index": 143, "cosine": 0.97, "image": DATA_URI}]}),
    **failures(400, 401, 403, 404, 408, 413, 415, 422, 429, 503),
}
INFO_RESPONSES: Responses = {
    **loose(
        {
            "version": "0.2.0",
            "encoder": {
                "name": ENCODER["model"],
                "revision": ENCODER["revision"],
                "dimension": 256,
                "preprocessing": {"size": 28, "resize": "stretch", "channels": 1, "mean": [0.286], "std": [0.353]},
            },
            "encoders": [ENCODER],
            "compared_with": ENCODER,
            "limits": {
                "max_batch": 32,
                "max_pending_images": 512,
                "max_images_per_request": 128,
                "max_body_bytes": 33554432,
                "max_pixels": 50000000,
                "request_timeout": 30.0,
            },
            "engine": {"name": "onnx", "device": "cpu", "dtype": "float32", "threads": 1},
            "monitor": {"enabled": True, "windows": [300.0, 3600.0], "block_rows": 256},
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
        }
    ),
    **failures(503),
}
FIGURES = {
    "rows": 256,
    "dimension": 256,
    "participation_ratio": 26.7,
    "effective_rank": 38.2,
    "total_variance": 0.37,
    "dead_fraction": 0.0,
}
SWAP_RESPONSES: Responses = {
    **example(
        {
            "served": ENCODER,
            "previous": ENCODER,
            "compared_with": ENCODER,
            "judgement": {
                "passed": True,
                "reason": "as varied as it should be; judged beside fashion-byol on its 256 canary images",
                "candidate": FIGURES,
                "incumbent": FIGURES,
            },
        }
    ),
    **failures(400, 401, 403, 404, 408, 409, 413, 415, 422, 503),
}
