"""Started by torchrun from test_deepspeed.py: several training runs, one after the other, in the same two processes.

Usage: deepspeed_worker.py CASES.json, a list of RunConfig dicts; "rows" and "deepspeed" alone: see `no_response`.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch

from tkpo.distributed import leave
from tkpo.run_config import RunConfig
from tkpo.runs import run

torch.set_num_threads(1)
warnings.filterwarnings("ignore")


def no_response(case):
    """Train on given token rows, of which one has no response; then look at what is left in the modules."""
    from test_deepspeed import train_rows

    trainer = train_rows(case["model"], case["rows"], case["output"], case["deepspeed"])
    model = trainer.model
    held = [name for name, p in model.named_parameters() if p.ds_status.name == "AVAILABLE" and not p.ds_persist]
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    own_forward = [name for name, m in model.named_modules() if "forward" in vars(m)]
    log = [line for line in trainer.state.log_history if "loss" in line]
    if int(os.environ["RANK"]) == 0:
        found = {"log": log, "held": held, "hooks": hooks, "own_forward": own_forward}
        Path(case["output"], "found.json").write_text(json.dumps(found))


for case in json.loads(Path(sys.argv[1]).read_text()):
    if "rows" in case:
        no_response(case)
    else:
        run(RunConfig(**case))

leave()
