"""From logits to tokens: penalties, truncation, the draw, and log probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opsin.engine.grammar import Guide
from opsin.types import SamplingParams, TokenLogprob

# (logits (vocab,), all token ids so far, number of prompt tokens) -> logits
LogitsProcessor = Callable[[Tensor, SequenceOf[int], int], Tensor]


def repetition_penalty(penalty: float, context: int | None) -> LogitsProcessor:
    """Divide positive and multiply negative logits of tokens seen (arXiv:1909.05858).

    `context` limits the look back to that many tokens, the prompt included; None means all.
    """

    def process(logits: Tensor, token_ids: SequenceOf[int], num_prompt: int) -> Tensor:
        del num_prompt
        recent = token_ids[-context:] if context else token_ids
        seen = torch.tensor(sorted(set(recent)), dtype=torch.long, device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        return logits

    return process


def presence_frequency_penalty(presence: float, frequency: float) -> LogitsProcessor:
    """OpenAI's penalties: over generated tokens, `presence` once and `frequency` for each time."""

    def process(logits: Tensor, token_ids: SequenceOf[int], num_prompt: int) -> Tensor:
        generated = torch.tensor(token_ids[num_prompt:], dtype=torch.long, device=logits.device)
        tokens, counts = generated.unique(return_counts=True)
        logits[tokens] -= presence + frequency * counts
        return logits

    return process


def logit_bias(bias: dict[int, float]) -> LogitsProcessor:
    """Add a constant to the logits of some tokens."""
    tokens, values = list(bias), list(bias.values())

    def process(logits: Tensor, token_ids: SequenceOf[int], num_prompt: int) -> Tensor:
        del token_ids, num_prompt
        logits[tokens] += torch.tensor(values, device=logits.device)
        return logits

    return process


def processors(params: SamplingParams) -> list[LogitsProcessor]:
    """What a request's parameters ask to be done to its logits, in order."""
    chain: list[LogitsProcessor] = []
    if params.repetition_penalty != 1.0:
        chain.append(repetition_penalty(params.repetition_penalty, params.repetition_context_size))
    if params.presence_penalty or params.frequency_penalty:
        chain.append(presence_frequency_penalty(params.presence_penalty, params.frequency_penalty))
    if params.logit_bias:
        chain.append(logit_bias(dict(params.logit_bias)))
    return chain


def truncated(logprobs: Tensor, params: SamplingParams) -> Tensor:
    """Log probabilities (vocab,) with the tokens cut off by top-k, top-p and min-p at -inf.

    top-p keeps the fewest most likely tokens that reach the mass, the one that reaches it included;
    min-p keeps those at least that fraction as likely as the likeliest (arXiv:2407.01082).
    """
    if params.min_p > 0:
        floor = logprobs.max() + torch.tensor(params.min_p).log()
        logprobs = logprobs.masked_fill(logprobs < floor, -torch.inf)
    if 0 < params.top_k < logprobs.numel():
        kept, indices = logprobs.topk(params.top_k)
        logprobs = torch.full_like(logprobs, -torch.inf).scatter(0, indices, kept)
    if params.top_p < 1:
        ordered, indices = logprobs.sort(descending=True, stable=True)
        before = ordered.softmax(0).cumsum(0) - ordered.softmax(0)
        ordered = ordered.masked_fill(before >= params.top_p, -torch.inf)
        ordered[0] = 0.0 if ordered[0] == -torch.inf else ordered[0]
        logprobs = torch.full_like(logprobs, -torch.inf).scatter(0, indices, ordered)
    return logprobs


def log_probability(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """A token's log probability under logits (vocab,), with the `count` most likely tokens'."""
    logprobs = logits.log_softmax(0)
    values, indices = logprobs.topk(min(count, logprobs.numel()))
    top = tuple(zip(indices.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)


@dataclass(slots=True)
class Sampler:
    """One request's way of choosing tokens; with a seed, the same whatever runs beside it.

    `is_plain_greedy`: the choice is the largest raw logit and nothing else is asked.
    """

    params: SamplingParams
    chain: list[LogitsProcessor]
    generator: torch.Generator
    guide: Guide | None = None
    is_plain_greedy: bool = field(init=False)

    def __post_init__(self) -> None:
        params = self.params
        chooses = params.temperature > 0 or bool(self.chain) or self.guide is not None
        self.is_plain_greedy = not chooses and params.logprobs is None

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        extra: Iterable[LogitsProcessor] = (),
        guide: Guide | None = None,
    ) -> Sampler:
        """A sampler in its starting state; `extra` processors come after the parameters' own.

        `guide` holds the answer to a grammar, whatever the processors make of the logits.
        """
        generator = torch.Generator()
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed)
        return cls(params, [*processors(params), *extra], generator, guide)

    @property
    def is_ready(self) -> bool:
        """Whether it is known what the grammar lets come next; without one always."""
        return self.guide is None or self.guide.ready

    def accept(self, token: int) -> bool:
        """Take note of the token that was chosen; whether the grammar says the answer is whole."""
        return self.guide is not None and self.guide.advance(token)

    def sample(
        self, logits: Tensor, token_ids: SequenceOf[int], num_prompt: int
    ) -> tuple[int, TokenLogprob | None]:
        """The next token from logits (vocab,), float32, and its log probability if that is asked.

        Log probabilities are those of the model, before grammar, temperature and truncation.
        """
        params = self.params
        raw = logits.clone() if self.guide is not None and self.chain else logits
        for process in self.chain:
            logits = process(logits, token_ids, num_prompt)
        unguided = logits
        if self.guide is not None:
            logits = self.guide.mask(logits, raw)
        if params.temperature == 0:
            token = int(logits.argmax())
        else:
            token = self._draw(logits)
        if params.logprobs is None:
            return token, None
        return token, log_probability(unguided, token, params.logprobs)

    def _draw(self, logits: Tensor) -> int:
        scaled = (logits / self.params.temperature).log_softmax(0)
        probabilities = truncated(scaled, self.params).softmax(0).cpu().double()
        # One uniform number a token, inverted through the cumulative distribution in token order.
        point = torch.rand((), generator=self.generator, dtype=torch.float64)
        cumulative = probabilities.cumsum(0)
        index = int(torch.searchsorted(cumulative, point * cumulative[-1], right=True))
        likely = probabilities.nonzero()
        return min(index, int(likely[-1]))
