"""/tokenize and /detokenize as vLLM's clients call them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from opsin.errors import InputError
from opsin.prompt.api import apply_chat_template
from opsin.server.conversation import conversation
from opsin.server.fields import MAX_MESSAGES, Body, JsonObject, TokenId, validated
from opsin.server.manager import Loaded


class TokenizeBody(Body):
    """Text as it stands in `prompt`, or a conversation in `messages`, rendered first."""

    model: Annotated[str, Field(max_length=512)] = "default"
    prompt: str | None = None
    messages: Annotated[list[JsonObject], Field(min_length=1, max_length=MAX_MESSAGES)] | None = (
        None
    )
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """Token ids to turn back into text."""

    model: Annotated[str, Field(max_length=512)] = "default"
    tokens: list[TokenId]


def parse(body: bytes) -> TokenizeBody:
    """The body, which has either a prompt or messages."""
    fields = validated(TokenizeBody, body)
    if (fields.prompt is None) == (fields.messages is None):
        raise InputError("There must be a prompt or messages, not both", param="prompt")
    return fields


def tokenize(fields: TokenizeBody, loaded: Loaded) -> dict[str, Any]:
    """The token ids of a text or conversation; media keep their one placeholder each."""
    tokenizer = loaded.processor.tokenizer
    if fields.messages is None:
        assert fields.prompt is not None
        ids = tokenizer.encode(fields.prompt, fields.add_special_tokens is not False)
    else:
        text = apply_chat_template(
            loaded.processor,
            loaded.processor.config,
            list(conversation(fields.messages)),
            add_generation_prompt=fields.add_generation_prompt is not False,
        )
        ids = tokenizer.encode_prompt(str(text))
    reply = {"count": len(ids), "max_model_len": loaded.engine.max_context, "tokens": ids}
    if fields.return_token_strs:
        reply["token_strs"] = [loaded.names.data(i).decode("utf-8", "replace") for i in ids]
    return reply


def detokenize(fields: DetokenizeBody, loaded: Loaded) -> dict[str, Any]:
    """The text of token ids, special tokens included."""
    size = loaded.model.decoder.config.vocab_size
    unknown = next((token for token in fields.tokens if token >= size), None)
    if unknown is not None:
        raise InputError(
            f"There is no token {unknown}", why=f"the model has {size}", param="tokens"
        )
    return {"prompt": loaded.processor.tokenizer.decode(fields.tokens, skip_special_tokens=False)}
