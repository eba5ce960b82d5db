"""Started by `accelerate launch` from test_fsdp.py, in two CPU processes: fsdp_worker.py CASES.json, RunConfig dicts.

Accelerate splits models among GPU processes only, though torch's FSDP2 runs on gloo as well: here it is told that the
processes are GPU processes, so that it takes the same way through its code and ours.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from tkpo import runs
from tkpo.distributed import leave
from tkpo.run_config import RunConfig

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
plain_init, plain_metrics = PartialState.__init__, runs._metrics


def init(self, *args, **kwargs):
    plain_init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def metrics(trainer, *args):
    split = sum(isinstance(p, DTensor) for p in trainer.model.parameters())
    return {**plain_metrics(trainer, *args), "split": split == len(list(trainer.model.parameters()))}


PartialState.__init__ = init
runs._metrics = metrics
for case in json.loads(Path(sys.argv[1]).read_text()):
    runs.run(RunConfig(**case))
leave()
