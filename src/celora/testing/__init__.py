"""Tests for an algorithm in a package of your own, with pytest:

    from celora.testing import AlgorithmContract
    from my_package.my_method import MyMethod

    class TestMyMethod(AlgorithmContract):
        algorithm = MyMethod

They check on four toy clients that it is deterministic, does not depend on the order of replies, resumes bit for bit,
survives clients that are away or diverge, changes nothing it is handed, and never lets 32 bytes of what a client keeps
into anything that crosses.
"""

import pytest

pytest.register_assert_rewrite(
    *(f"{__name__}.{part}" for part in ("faults", "purity", "ranks", "reading", "reproducibility", "travel"))
)

from celora.testing.contract import AlgorithmContract  # noqa: E402  # after pytest knows whose assertions to explain

__all__ = ["AlgorithmContract"]
