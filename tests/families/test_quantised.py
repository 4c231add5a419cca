"""Every family with its matrices quantised while loading: near the same model as it is stored."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from opsin.engine import packing
from opsin.nn.experts import ExpertLinear
from opsin.nn.linear import Linear

from .checkpoints import Case
from .conftest import Lab
from .ours import Ours, relative_error
from .test_families import is_ported
from .zoo import CASES

# One case of each family.
FIRST = {case.config["model_type"]: case for case in reversed(CASES) if is_ported(case)}
# Of the largest logit. Tiny random models blow small differences up, and a router that sees values
# of 8 bits sends some tokens to other experts; a part in the wrong place gives 1 and more.
TOLERANCE, ROUTED_TOLERANCE = 0.3, 0.8


@pytest.fixture(params=sorted(FIRST.values(), key=str), ids=str)
def lab(request: pytest.FixtureRequest, labs: Callable[[Case], Lab]) -> Lab:
    """The lab of each family's first case."""
    return labs(request.param)


@pytest.mark.slow
def test_eight_bits_stay_near(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LEAST_ROWS", 1)
    quantised = Ours(lab.case, lab.published, quantize=8)
    modules = list(quantised.model.decoder.modules())
    assert any(m.packed for m in modules if isinstance(m, Linear | ExpertLinear))
    routed = any(isinstance(m, ExpertLinear) for m in modules)
    for name, scene in list(lab.scenes.items())[:2]:
        plain = lab.ours.logits(lab.ours.prompt(scene))
        near = quantised.logits(quantised.prompt(scene))
        error = relative_error(near, plain)
        assert 0 < error < (ROUTED_TOLERANCE if routed else TOLERANCE), name
