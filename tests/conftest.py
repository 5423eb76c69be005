import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
torch.set_num_threads(1)  # small tensors: threads only cost, and a busy machine makes them cost a lot
