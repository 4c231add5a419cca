"""Holds answers to a grammar: which tokens may come next, as llguidance computes it."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from opsin.engine.gate import Gate
from opsin.errors import InputError, OpsinError
from opsin.prompt.json_schema import enforceable
from opsin.prompt.tokenizer import Tokenizer
from opsin.prompt.vocabulary import Vocabulary
from opsin.types import Constraint

_EXCERPT = re.compile(r"^(?:\s*\d+ \|.*|\s*\^+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What compiling and following one grammar may take.

    chars: of its text. seconds: to compile it. row_items, step_items: how many ways of reading the
    answer so far are kept, and looked at for one token. stack: bytes for the compiler, which goes
    as deep as rules name other rules; only what is used becomes memory.
    """

    chars: int = 1 << 18
    seconds: float = 10.0
    row_items: int = 5_000
    step_items: int = 10_000
    stack: int = 1 << 29


class GrammarTooComplex(InputError):
    """Following the grammar takes more than its limits allow."""

    code = "grammar_too_complex"


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the last ones; for any thread."""

    KEPT = 32

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: Collection[int],
        limits: GrammarLimits | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.limits = limits or GrammarLimits()
        self.eos_token_ids = frozenset(eos_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()

    def compile(self, text: str, param: str) -> Grammar:
        """A grammar from its text: Lark, or llguidance's JSON of several.

        Raises InputError that names `param` and says why, also where it takes too long.
        """
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text]
        if len(text) > self.limits.chars:
            raise InputError(
                f"{param} is too large",
                why=f"as a grammar it has {len(text)} characters of at most {self.limits.chars}",
                param=param,
            )
        vocabulary = self.vocabulary()
        made = _in_deep_thread(lambda: self._compile(vocabulary, text, param), self.limits, param)
        with self._lock:
            self._kept[text] = made
            while len(self._kept) > self.KEPT:
                self._kept.popitem(last=False)
        return made

    def _compile(self, vocabulary: llguidance.LLTokenizer, text: str, param: str) -> Grammar:
        limits = llguidance.LLParserLimits(
            max_items_in_row=self.limits.row_items, step_max_items=self.limits.step_items
        )
        matcher = llguidance.LLMatcher(vocabulary, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise refused(param, matcher.get_error())
        size = self.tokenizer.vocab_size
        first = _mask(matcher, size, self.eos_token_ids)
        if matcher.is_error():
            raise refused(param, matcher.get_error())
        if not first.any():
            raise refused(param, "no text at all fits it")
        return Grammar(matcher, first, size, self.eos_token_ids, param)

    def vocabulary(self) -> llguidance.LLTokenizer:
        """llguidance's view of the tokenizer; made once, which takes a second or two."""
        with self._lock:
            if self._vocabulary is None:
                ends = sorted(self.eos_token_ids)
                if not ends:
                    raise InputError(
                        "The form of an answer cannot be enforced with this model",
                        why="its tokenizer has no token that ends an answer",
                        remedy="Leave the form out, or choose another model",
                    )
                self._vocabulary = llguidance.LLTokenizer(
                    Vocabulary(self.tokenizer, ends[0]),  # type: ignore[arg-type]
                    n_vocab=self.tokenizer.vocab_size,
                    eos_token=ends,
                )
            return self._vocabulary


def _in_deep_thread(work: Callable[[], Grammar], limits: GrammarLimits, param: str) -> Grammar:
    """The result of `work`, done where recursion cannot overflow, and given up when it is late."""
    results: list[Grammar | OpsinError] = []

    def run() -> None:
        try:
            results.append(work())
        except OpsinError as error:
            results.append(error)

    with _STACK_SIZE:
        before = threading.stack_size(limits.stack)
        try:
            thread = threading.Thread(target=run, name="opsin-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join(limits.seconds)
    if thread.is_alive():
        raise GrammarTooComplex(
            f"{param} cannot be used",
            why=f"compiling it takes more than {limits.seconds:g} seconds",
            remedy="Make it simpler",
            param=param,
        )
    result = results[0]
    if isinstance(result, OpsinError):
        raise result
    return result


_STACK_SIZE = threading.Lock()  # the size is a setting of the whole process


def refused(param: str, message: str) -> InputError:
    """The error for a grammar that is wrong, or asks for what cannot be enforced."""
    reason = _EXCERPT.sub("", message.partition("<state>")[0])
    reason = " ".join(reason.split())
    return InputError(
        f"{param} cannot be used",
        why=reason if len(reason) <= 400 else reason[:200] + " ... " + reason[-190:],
        remedy="Correct it, or leave out what it asks for",
        param=param,
    )


def _mask(
    matcher: llguidance.LLMatcher, size: int, eos_token_ids: Collection[int]
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which tokens (vocabulary,) may come next; those that end an answer, where it may end."""
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    allowed = np.unpackbits(bits, count=size, bitorder="little").view(np.bool_)
    allowed[list(eos_token_ids)] = matcher.is_accepting()
    return allowed


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar; each answer gets a guide of its own. `first` is where they begin."""

    matcher: llguidance.LLMatcher
    first: np.ndarray[Any, np.dtype[np.bool_]]
    size: int
    eos_token_ids: frozenset[int]
    param: str

    def guide(self, gate: Gate | None = None) -> Guide:
        """What leads one answer along the grammar, once the gate is open."""
        return Guide(self, gate)


class Guide:
    """One answer's way through a grammar.

    `mask` narrows the logits of the next token and `advance` takes the chosen one. What may come
    next is computed by `compute`, in any one thread at a time, or by `mask` where nobody has.
    """

    def __init__(self, grammar: Grammar, gate: Gate | None = None) -> None:
        self.grammar = grammar
        self.gate = gate
        self._matcher = grammar.matcher.deep_copy()
        self._allowed = grammar.first
        self._bias = _bias(grammar.first)
        self._failed = ""
        self.ready = True

    @property
    def failure(self) -> OpsinError | None:
        """Why the grammar cannot be followed any further, if it cannot."""
        if not self._failed:
            return None
        cause = refused(self.grammar.param, self._failed)
        return GrammarTooComplex(
            f"{self.grammar.param} cannot be followed to its end",
            why=cause.why,
            remedy="Make it simpler",
            param=self.grammar.param,
        )

    def compute(self) -> None:
        """Find out which tokens may come next."""
        allowed = _mask(self._matcher, self.grammar.size, self.grammar.eos_token_ids)
        if self._matcher.is_error():
            self._failed = self._matcher.get_error()
        else:
            self._allowed = allowed
            self._bias = _bias(allowed)
        self.ready = True

    def mask(self, logits: Tensor, raw: Tensor) -> Tensor:
        """Logits (vocab,) without the tokens that may not come next.

        Where the processors before left none of those that may, `raw` decides, as the model gave
        them. Raises GrammarTooComplex where the grammar cannot be followed any further.
        """
        if not self.ready:
            self.compute()
        if self.failure is not None:
            raise self.failure
        is_open = self.gate is None or self.gate.is_open
        bias = self._bias if is_open else _bias(self._allowed_tokens())
        bias = bias.to(logits.device)
        masked = _only(logits, bias)
        if raw is not logits and bool(masked.max() == -torch.inf):
            return _only(raw, bias)
        return masked

    def _allowed_tokens(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """The tokens (vocabulary,) that may come next, by gate and grammar."""
        gate = self.gate
        if gate is None or gate.is_open:
            return self._allowed
        allowed = self._allowed.copy() if gate.at_grammar else np.ones_like(self._allowed)
        allowed[list(self.grammar.eos_token_ids)] &= gate.at_grammar
        allowed[list(gate.may_be)] = True
        return allowed

    def advance(self, token: int) -> bool:
        """Take the chosen token; whether the answer is complete, so that nothing may follow."""
        if self.gate is not None and not self.gate.is_open:
            fits = token < len(self._allowed) and bool(self._allowed[token])
            if not self.gate.advance(token, fits):
                return False
        if token in self.grammar.eos_token_ids:
            return True
        self.ready = False
        if not self._matcher.consume_token(token):
            self._failed = self._matcher.get_error() or "a token does not fit it"
            self.ready = True
            return False
        return bool(self._matcher.is_stopped())


def _bias(allowed: np.ndarray[Any, np.dtype[np.bool_]]) -> Tensor:
    """0 for the allowed tokens, -inf for the others; (vocabulary,), float32.

    Adding it takes a tenth of the time of filling by a mask.
    """
    return torch.from_numpy(np.where(allowed, np.float32(0), np.float32(-np.inf)))


def _only(logits: Tensor, bias: Tensor) -> Tensor:
    """Logits (vocab,) of the allowed tokens, the others and those beyond the vocabulary at -inf."""
    known = min(bias.numel(), logits.numel())
    masked = torch.full_like(logits, -torch.inf)
    torch.add(logits[:known], bias[:known], out=masked[:known])
    return masked


def grammar_text(constraint: Constraint | None, calls: str | None) -> str | None:
    """The grammar of an answer: of a form, of tool calls (Lark), of either one, or None.

    Raises InputError where the constraint's value is not of its kind.
    """
    if constraint is None:
        return calls
    answer = _answer(constraint)
    if calls is None:
        return json.dumps({"grammars": [answer]})
    either = {"name": "either", "lark_grammar": "start: @answer | @calls"}
    named = {"name": "calls", "lark_grammar": calls}
    return json.dumps({"grammars": [either, {"name": "answer", **answer}, named]})


def _answer(constraint: Constraint) -> dict[str, Any]:
    value, param = constraint.value, constraint.param
    if constraint.kind == "json_object":
        return {"json_schema": enforceable({"type": "object"}, param)}
    if constraint.kind == "json_schema":
        return {"json_schema": enforceable(value, param)}
    if constraint.kind == "choice":
        return {"lark_grammar": f"start: {' | '.join(_literals(value, param))}"}
    if not isinstance(value, str) or not value:
        raise InputError(f"{param} is not a text", param=param)
    if constraint.kind == "regex":
        text: str = json.loads(llguidance.LLMatcher.grammar_from_regex(value))["grammars"][0][
            "lark_grammar"
        ]
        return {"lark_grammar": text}
    return {"lark_grammar": value}


def _literals(texts: Any, param: str) -> list[str]:
    whole = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not whole or not texts or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"{param} is not a list of texts", param=param)
    return [json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(texts)]
