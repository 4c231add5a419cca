"""What an engine may use, and how it keeps what it has computed."""

from __future__ import annotations

from dataclasses import dataclass

from opsin.decoder.cache import CacheFormat
from opsin.decoder.config import DecoderConfig
from opsin.decoder.layout import KeptTokens
from opsin.errors import InputError

SPECULATIVE = ("ngram",)
FIRST_KEPT = 4  # tokens that a window never leaves: attention leans on them (arXiv:2309.17453)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine may use.

    max_num_seqs      requests computed at once; the others wait
    max_queue         requests that may wait; one more is refused (QueueFull)
    prefill_step_size tokens computed in one step over all requests
    memory            bytes for the key-value cache; None: a quarter of the machine's memory on a
                      CPU, 80 % of what is free on a GPU
    block_size        tokens in one cache block
    max_context       tokens of prompt and answer together (of each, where an encoder reads the
                      prompt); None: as many as the model was made for
    prefix_cache      keep what finished requests computed, for requests that begin the same
    media_cache       bytes of encoded media kept: a picture asked again is not encoded again
    kv_bits           16, 8 or 4 bits for each cached key and value; None is 16
    kv_group_size     cached values that share a scale and a bias, below 16 bits: 32, 64 or 128
    quantized_kv_start  tokens of each sequence that stay at 16 bits, up to the next whole block
    max_kv_size       tokens of a sequence that its next token sees: the first four and the last
                      ones; None: all. What lies between is forgotten, so that memory stays bounded
    speculative       "ngram": guess what comes next from the request's own tokens, and compute
                      guesses where that was measured to pay; the answers are the same. None: off
    """

    max_num_seqs: int = 64
    max_queue: int = 1024
    prefill_step_size: int = 2048
    memory: int | None = None
    block_size: int = 32
    max_context: int | None = None
    prefix_cache: bool = True
    media_cache: int = 2**28
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    max_kv_size: int | None = None
    speculative: str | None = None

    def cache_format(self, config: DecoderConfig) -> CacheFormat:
        """How a decoder's keys and values are kept; InputError if they cannot be."""
        form = CacheFormat(self.kv_bits or 16, self.kv_group_size, self.quantized_kv_start)
        why = form.why_not(config)
        if why:
            raise InputError(
                "The key-value cache of this model cannot be quantised",
                why=f"{why}, which groups of {self.kv_group_size} do not divide"
                if config.attentions
                else why,
                remedy="Use another kv_group_size, or leave kv_bits out",
                param="kv_bits",
            )
        return form

    def speculates(self, config: DecoderConfig) -> bool:
        """Whether guesses are computed for a decoder; InputError if they cannot be."""
        if self.speculative is None:
            return False
        if self.speculative not in SPECULATIVE:
            raise InputError(
                f"speculative cannot be {self.speculative!r}",
                remedy=f"Use {', '.join(SPECULATIVE)}, or leave it out",
                param="speculative",
            )
        if config.has_states:
            raise InputError(
                "This model cannot compute guesses",
                why="its recurrent layers cannot take back what a wrong guess wrote",
                remedy="Leave speculative out",
                param="speculative",
            )
        return True

    def kept_tokens(self, config: DecoderConfig) -> KeptTokens | None:
        """The window over a decoder's sequences, if any; InputError if it can have none."""
        if self.max_kv_size is None:
            return None
        why = ""
        if config.cross_attentions:
            why = "its text reads pictures through layers that have no window"
        elif not config.attentions:
            why = "no layer of it keeps keys and values of tokens"
        if why:
            raise InputError(
                "This model cannot have a window",
                why=why,
                remedy="Leave max_kv_size out",
                param="max_kv_size",
            )
        if self.max_kv_size <= FIRST_KEPT:
            raise InputError(
                f"max_kv_size cannot be {self.max_kv_size}",
                why=f"the first {FIRST_KEPT} tokens are always kept",
                remedy="Give more",
                param="max_kv_size",
            )
        return KeptTokens(FIRST_KEPT, self.max_kv_size - FIRST_KEPT)
