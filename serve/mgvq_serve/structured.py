"""The fields of a request that ask for a form of the answer (part of `protocol.ChatRequest`).

OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*` all become one
`mgvq_runtime.StructuredOutputsParams`. Whether a schema, regex or grammar makes sense is for the
runtime to say; `chat` gives its complaint the name of the field that was sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mgvq_runtime import StructuredOutputsParams
from mgvq_runtime.errors import RequestError
from mgvq_serve.errors import ApiError

Schema = dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class JsonSchema(_Strict):
    """A named schema; `strict` or not, the answer follows it."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Annotated[Schema, Field(alias="schema")]


class ResponseFormat(_Strict):
    """OpenAI's field: any text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Strict):
    """vLLM's own field; what it has besides is refused."""

    model_config = ConfigDict(extra="forbid")

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False


class StructuredFields(_Strict):
    """Every field that asks for a form; a request may use one way."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None


@dataclass(frozen=True)
class AskedForm:
    """A form, and the field it came in."""

    param: str
    params: StructuredOutputsParams


def asked_form(fields: StructuredFields) -> AskedForm | None:
    """Return the form a request asks for, None where it may be any text.

    Raises:
        ApiError: 400 if it asks in two ways, or the form has the wrong shape.
    """
    asked: dict[str, dict[str, Any]] = {}
    wanted = fields.response_format
    if wanted is not None and wanted.type == "json_object":
        asked["response_format"] = {"json_object": True}
    elif wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None:
            param = "response_format.json_schema"
            raise ApiError(400, f"{param} is missing; it holds the schema", param=param)
        asked["response_format.json_schema.schema"] = {"json": wanted.json_schema.schema_}
    if fields.structured_outputs is not None:
        given = fields.structured_outputs.model_dump(by_alias=True, exclude_defaults=True)
        asked |= {"structured_outputs": given} if given else {}
    for kind in ("json", "regex", "choice", "grammar"):
        if (value := getattr(fields, f"guided_{kind}")) is not None:
            asked[f"guided_{kind}"] = {kind: value}
    if fields.guided_whitespace_pattern is not None:
        white = {"whitespace_pattern": fields.guided_whitespace_pattern}
        asked["guided_json"] = asked.get("guided_json", {}) | white
    if len(asked) > 1:
        first, second = list(asked)[:2]
        raise ApiError(400, f"{second} and {first} ask for two forms; send one", param=second)
    for param, values in asked.items():
        return _form(param, values)
    return None


def _form(param: str, values: dict[str, Any]) -> AskedForm:
    is_vllm = param == "structured_outputs"
    try:
        params = StructuredOutputsParams(**values)
    except RequestError as error:
        raise ApiError(400, str(error), param=error.param if is_vllm else param) from None
    return AskedForm(f"{param}.{params.kind}" if is_vllm else param, params)
