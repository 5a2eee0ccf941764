"""What the scripts stand on."""

import logging
import os

# A thread of torch's that waits for others looks for work 300,000 times before it sleeps, and keeps
# the core from whoever has work on it: of three runs on two cores each had a 17th of its speed.
# libgomp reads this as torch is imported, so scripts that import torch import this package first.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "700"

# transformers 5.23 imports torchao where it is installed, and torchao 0.18.0 uses what torch 2.14.1
# calls deprecated; neither is for users of this repo to mend. To go with the next torchao.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
# PEFT imports bitsandbytes where it is installed, and that warns, on CPUs with AVX-512 for bf16, of
# a kernel for generation that is missing. It is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
