from trimmed_mean import TrimmedMean

from celora.testing import AlgorithmContract


class TestTrimmedMean(AlgorithmContract):
    algorithm = TrimmedMean
