"""One thread for all tests: the tensors are tiny, and on a busy machine threads cost a hundredfold."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and scikit-learn start their pools

import torch

torch.set_num_threads(1)
