"""One thread for PyTorch in every test process: the tests' tensors are small, and several processes may share
the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
