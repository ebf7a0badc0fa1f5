"""The published description of the interface (``/openapi.json``).

Of a request it fixes what the router itself needs; engines and their versions take more, and say
themselves what they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Schema = dict[str, Any]

_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_STATUSES = {
    400: "The body is no JSON object with a model, or the engine does not take it.",
    401: "An API key is needed, or the one given is not known.",
    403: "The API key may not use this model.",
    404: "There is no such model, or it does not serve this path.",
    405: "Only the methods described are allowed.",
    408: "The body did not come in time.",
    413: "The request is larger than is allowed.",
    415: "The body is not declared as JSON.",
    422: "The engine does not take the body.",
    429: "Too many requests wait for this model.",
    500: "The engine failed.",
    502: "The engine broke off.",
    503: "The model is not available now.",
    504: "The request waited too long, for its turn or for its engine.",
}
_WITH_RETRY_AFTER = {429, 503}
_TEXT_OR_TOKENS: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
    ]
}
_MESSAGE: Schema = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "user", "assistant", "tool", "developer"]},
        "content": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}],
        },
    },
}
_SAMPLING: Schema = {
    "stream": {"type": "boolean", "default": False},
    "max_tokens": {"type": "integer", "minimum": 1},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "n": {"type": "integer", "minimum": 1, "maximum": 8},
}


_CONVERSATION: Schema = {"type": "array", "items": _MESSAGE, "minItems": 1}


def _request(model: Schema, required: str, schema: Schema, more: Schema) -> Schema:
    properties = {"model": model, required: schema, **more}
    return {"type": "object", "required": ["model", required], "properties": properties}


def description(version: str, models: Sequence[str] | None) -> dict[str, Any]:
    """An OpenAPI 3.1 document. ``models``: all names; None where API keys are needed, which also
    open what their names are.
    """
    model: Schema = {"type": "string", "minLength": 1} if models is None else {"enum": [*models]}
    requests = {
        "Completion": _request(model, "prompt", _TEXT_OR_TOKENS, _SAMPLING),
        "Chat": _request(model, "messages", _CONVERSATION, _SAMPLING),
        "Embedding": _request(model, "input", _TEXT_OR_TOKENS, {}),
    }
    paths: dict[str, Any] = {
        "/v1/completions": {"post": _engine_call("Completion", "Completes a text.")},
        "/v1/chat/completions": {"post": _engine_call("Chat", "Answers a conversation.")},
        "/v1/embeddings": {"post": _engine_call("Embedding", "Embeds texts.")},
        "/v1/models": {"get": _look("All models and aliases.", "application/json", 401)},
        "/v1/models/{model}": {
            "parameters": [{"name": "model", "in": "path", "required": True, "schema": model}],
            "get": _look("One model.", "application/json", 401, 404),
        },
        "/health": {"get": {**_look("Whether the service runs.", "application/json")}},
        "/metrics": {"get": _look("Metrics for Prometheus.", "text/plain", 401, 403)},
        "/status": {"get": _look("All models and queues.", "application/json", 401, 403)},
    }
    paths["/health"]["get"]["security"] = []
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "kvcached serve", "version": version},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR, **requests},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    if models is None:
        document["security"] = [{"key": []}]
    return document


def _engine_call(name: str, summary: str) -> dict[str, Any]:
    return {
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}},
        },
        "responses": {
            "200": {
                "description": "The engine's answer; a stream of events where one was asked for.",
                "content": {
                    "application/json": {"schema": {"type": "object"}},
                    "text/event-stream": {},
                },
            },
            **_errors(*_STATUSES),
        },
    }


def _look(summary: str, kind: str, *errors: int) -> dict[str, Any]:
    schema = {"type": "object"} if kind == "application/json" else {"type": "string"}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer.", "content": {kind: {"schema": schema}}},
            **_errors(405, *errors),
        },
    }


def _errors(*statuses: int) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status in statuses:
        answers[str(status)] = {"description": _STATUSES[status], "content": content}
        if status in _WITH_RETRY_AFTER:
            header = {"description": "Seconds.", "schema": {"type": "string"}}
            answers[str(status)]["headers"] = {"Retry-After": header}
    return answers
