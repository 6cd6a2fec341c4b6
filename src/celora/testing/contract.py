"""What every algorithm promises, as a class of tests that anybody's algorithm can be put through."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import pytest

from celora.testing.faults import Faults
from celora.testing.purity import Purity
from celora.testing.ranks import MixedRanks
from celora.testing.reading import Reading
from celora.testing.reproducibility import Reproducibility
from celora.testing.travel import Travel
from celora.testing.variant import Variant, variants


class AlgorithmContract(Purity, Reproducibility, Faults, Travel, MixedRanks, Reading):
    """The contract of one algorithm: inherit it under a name that pytest collects, and say which algorithm.

        class TestMyMethod(AlgorithmContract):
            algorithm = MyMethod

    Every test is run under each head policy that the algorithm accepts, and with each of the settings in `more`.
    """

    algorithm: ClassVar[Any]
    more: ClassVar[Sequence[Mapping[str, Any]]] = ()

    @classmethod
    @cache
    def variants(cls) -> Mapping[str, Variant]:
        """The algorithm in each way it is tested."""
        return variants(cls.algorithm, cls.more)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """pytest's hook: a test that asks for `variant` is run with each, one that asks for `mixed` where ranks mix."""
        for name in {"variant", "mixed"}.intersection(metafunc.fixturenames):
            chosen = {n: v for n, v in self.variants().items() if name == "variant" or v.algorithm.info.mixed_ranks}
            metafunc.parametrize(name, list(chosen.values()), ids=list(chosen))
