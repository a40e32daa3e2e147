"""Settings of all tests."""

import torch

# the models are tiny: a second thread would cost more than it gives, and the more where others use the cores
torch.set_num_threads(1)
