"""The fields that request bodies share, their bounds, and the errors for those that break them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opsin.engine.asked import response_form, schema_of
from opsin.errors import InputError
from opsin.types import Constraint, SamplingParams

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_BIASES = 1024
MAX_MESSAGES = 4096
MAX_TOOLS = 256
MAX_SCHEMA_CHARS = 1 << 18
MAX_CHOICES = 4096
# Below this, the logits divided by it leave the range of float32 and only the largest survives.
COLDEST = 1e-5

StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
BiasedToken = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
JsonObject = dict[str, Any]
Kind: TypeAlias = Literal["json_object", "json_schema", "regex", "grammar", "choice"]


class Body(BaseModel):
    """A request body: JSON types as they stand, and no field that is not listed."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SamplingFields(Body):
    """How the next token is chosen: the fields that every protocol takes beside its own."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=10_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    repetition_context_size: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1000)] | None = None
    no_repeat_ngram_window: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None
    logit_bias: Annotated[dict[BiasedToken, Bias], Field(max_length=MAX_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None


FormText = Annotated[str, Field(min_length=1, max_length=MAX_SCHEMA_CHARS)]
Choices = Annotated[list[FormText], Field(min_length=1, max_length=MAX_CHOICES)]


class StructuredOutputs(Body):
    """The form of an answer as vLLM's clients write it."""

    json_: JsonObject | FormText | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: FormText | None = None
    choice: Choices | None = None
    grammar: FormText | None = None


class FormFields(Body):
    """What form the answer must have."""

    response_format: JsonObject | None = None
    regex: FormText | None = None
    grammar: FormText | None = None
    choice: Choices | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject | FormText | None = None
    guided_regex: FormText | None = None
    guided_choice: Choices | None = None
    guided_grammar: FormText | None = None


class PromptFields(Body):
    """How the prompt is made."""

    chat_template: Annotated[str, Field(max_length=1 << 18)] | None = None
    chat_template_kwargs: JsonObject | None = None
    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    processor_kwargs: JsonObject | None = None
    resize_shape: (
        Annotated[int, Field(ge=1, le=16384)]
        | Annotated[list[Annotated[int, Field(ge=1, le=16384)]], Field(min_length=1, max_length=2)]
        | None
    ) = None
    video_fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    video_max_frames: Annotated[int, Field(ge=1, le=100_000)] | None = None
    use_audio_in_video: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    task: Annotated[str, Field(max_length=128)] | None = None


Parsed = TypeVar("Parsed", bound=Body)


def validated(kind: type[Parsed], body: bytes) -> Parsed:
    """A body as its fields; InputError names the first that is wrong, missing or unknown."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None


def validated_value(kind: type[Parsed], value: Any, where: str) -> Parsed:
    """An object inside a body as its fields; `where` is its place in the body."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _explained(error, where) from None


def _explained(error: ValidationError, where: str = "") -> InputError:
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = errors[0]
    if first["type"] == "json_invalid":
        return InputError("The body is not valid JSON", why=first["msg"].partition(": ")[2])
    if not first["loc"]:
        what = f"{where} is not an object" if where else "The body is not a JSON object"
        return InputError(what, param=where or None)
    path = field_path(first["loc"], where)
    if first["type"] == "extra_forbidden":
        return InputError(
            f"Unknown field {path}",
            remedy="Leave it out: a field that would change nothing is not accepted",
            param=path,
        )
    if first["type"] == "missing":
        return InputError(f"{path} is missing", param=path)
    same = [e["msg"] for e in errors if e["loc"][0] == first["loc"][0]]
    return InputError(
        f"{path} cannot be used",
        why=" or ".join(_lowered(message) for message in dict.fromkeys(same[:3])),
        param=path,
    )


def field_path(location: tuple[int | str, ...], where: str = "") -> str:
    """`a[0].b` of a pydantic location, without the names of union members inside it."""
    path = where
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            path += f".{part[:80]}" if path else part[:80]
        elif not path:
            path = part[:80]
    return path


def _lowered(message: str) -> str:
    return message.replace("Input should", "it should")[:300]


def sampling(
    fields: SamplingFields,
    *,
    max_tokens: int,
    stop: str | list[str] | None,
    logprobs: int | None = None,
) -> SamplingParams:
    """The sampling parameters that a body states; what it leaves out keeps its default."""
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    temperature = fields.temperature or 0.0
    top_p = 1.0 if fields.top_p is None else fields.top_p
    bias = {int(token): value for token, value in (fields.logit_bias or {}).items()}
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if temperature < COLDEST else temperature,
        top_p=max(top_p, 1e-9),  # 0 means the likeliest token alone
        top_k=max(fields.top_k or 0, 0),  # -1 is vLLM's way to say off
        min_p=fields.min_p or 0.0,
        repetition_penalty=fields.repetition_penalty or 1.0,
        repetition_context_size=fields.repetition_context_size,
        no_repeat_ngram_size=fields.no_repeat_ngram_size,
        no_repeat_ngram_window=fields.no_repeat_ngram_window,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        logit_bias=bias,
        seed=fields.seed,
        stop=tuple(stops),
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        ignore_eos=bool(fields.ignore_eos),
        logprobs=logprobs,
    )


RESERVED = ("messages", "tools", "documents", "name", "chat_template", "tokenize")


def template_fields(fields: PromptFields, reasoning_effort: str | None = None) -> dict[str, Any]:
    """What the chat template is given, by the names `Processor.prepare` takes."""
    variables = dict(fields.chat_template_kwargs or {})
    for name in variables:
        if name in RESERVED:
            where = f"chat_template_kwargs.{name}"
            raise InputError(
                f"{where} cannot be set", why="the request has it elsewhere", param=where
            )
    thinking = fields.enable_thinking
    if reasoning_effort is not None:
        variables.setdefault("reasoning_effort", reasoning_effort)
        thinking = reasoning_effort != "none" if thinking is None else thinking
    given: dict[str, Any] = {}
    if thinking is not None:
        given["enable_thinking"] = thinking
    if variables:
        given["chat_template_kwargs"] = variables
    if fields.chat_template is not None:
        given["chat_template"] = fields.chat_template
    return given


def processor_fields(fields: PromptFields) -> dict[str, Any]:
    """The picture options of a body."""
    options = dict(fields.processor_kwargs or {})
    if fields.resize_shape is not None:
        options["resize_shape"] = fields.resize_shape
    return options


def video_fields(fields: PromptFields) -> dict[str, Any]:
    """How a body wants its videos taken, as options of the parts that do not say it themselves."""
    stated = {
        "fps": fields.video_fps,
        "max_frames": fields.video_max_frames,
        "use_audio_in_video": fields.use_audio_in_video or None,
    }
    return {name: value for name, value in stated.items() if value is not None}


def constraint(fields: FormFields) -> Constraint | None:
    """The form that a body wants its answer in; InputError where it asks for two."""
    wanted = fields.response_format
    asked = [] if wanted is None else [response_form(wanted, "response_format")]
    nested = fields.structured_outputs or StructuredOutputs()
    stated: list[tuple[Kind, Any, str]] = [
        ("regex", fields.regex, "regex"),
        ("grammar", fields.grammar, "grammar"),
        ("choice", fields.choice, "choice"),
        ("json_schema", fields.guided_json, "guided_json"),
        ("regex", fields.guided_regex, "guided_regex"),
        ("choice", fields.guided_choice, "guided_choice"),
        ("grammar", fields.guided_grammar, "guided_grammar"),
        ("json_schema", nested.json_, "structured_outputs.json"),
        ("json_object", nested.json_object or None, "structured_outputs.json_object"),
        ("regex", nested.regex, "structured_outputs.regex"),
        ("choice", nested.choice, "structured_outputs.choice"),
        ("grammar", nested.grammar, "structured_outputs.grammar"),
    ]
    asked += [
        Constraint(kind, schema_of(value, param) if kind == "json_schema" else value, param)
        for kind, value, param in stated
        if value is not None
    ]
    found = [one for one in asked if one is not None]
    if len(found) > 1:
        raise InputError(
            f"{found[0].param} and {found[1].param} cannot be used together",
            remedy="Send one of them",
            param=found[1].param,
        )
    return found[0] if found else None
